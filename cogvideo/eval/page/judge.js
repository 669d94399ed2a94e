// One rater's way through a study. The server knows where it stands; this page keeps the rater's random number.
const STORE = "cogvideo-judge-rater";
const QUESTIONS = {
  texture: ["Frame texture", "Do single frames look good?", "poor", "excellent"],
  motion: ["Motion realism", "Does the motion look real?", "poor", "excellent"],
  relevance: ["Semantic relevance", "Does the video show what the sentence says?", "not at all", "fully"],
  total: ["Overall", "How good is the video in all?", "very poor", "excellent"],
};
const byId = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

let rater = localStorage.getItem(STORE);
let trial = null;
let begun = 0;
let busy = false;

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) {
    throw Object.assign(new Error(answer.error || "the server refused it"), { status: response.status });
  }
  return answer;
}

function show(id) {
  for (const section of document.querySelectorAll("section")) section.hidden = section.id !== id;
}

function say(text) {
  byId("status").textContent = text;
}

function button(text, action, primary = false) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.className = primary ? "primary" : "";
  made.addEventListener("click", action);
  return made;
}

function clipFigure(name, number, several) {
  const figure = document.createElement("figure");
  figure.className = "clip";
  const video = document.createElement("video");
  Object.assign(video, { src: `clips/${name}.mp4`, loop: true, muted: true, playsInline: true, autoplay: !still });
  video.controls = still;
  video.setAttribute("aria-label", several ? `Video ${number}` : "The video");
  figure.append(video);
  if (several) figure.append(button(`Video ${number} is better`, () => vote({ choice: name })));
  return figure;
}

function scale(quality, highest) {
  const [title, question, low, high] = QUESTIONS[quality];
  const set = document.createElement("fieldset");
  const legend = document.createElement("legend");
  legend.append(`${title} `);
  const small = document.createElement("small");
  small.textContent = `${question} 1: ${low}, ${highest}: ${high}`;
  legend.append(small);
  const row = document.createElement("div");
  row.className = "scale";
  for (let score = 1; score <= highest; score++) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: quality, value: String(score) });
    input.addEventListener("change", updateSend);
    const text = document.createElement("span");
    text.textContent = String(score);
    label.append(input, text);
    row.append(label);
  }
  set.append(legend, row);
  return set;
}

function scores() {
  const found = {};
  for (const quality of Object.keys(trial.qualities)) {
    const input = document.querySelector(`input[name=${quality}]:checked`);
    if (input) found[quality] = Number(input.value);
  }
  return found;
}

function updateSend() {
  const send = byId("send");
  if (send) send.disabled = Object.keys(scores()).length < Object.keys(trial.qualities).length;
}

function showTrial() {
  byId("progress").value = trial.position / trial.count;
  byId("count").textContent = `${trial.position + 1} of ${trial.count}`;
  byId("prompt").textContent = trial.prompt;
  const several = trial.mode !== "ratings";
  byId("clips").replaceChildren(...trial.clips.map((name, i) => clipFigure(name, i + 1, several)));
  const form = byId("ratings");
  form.hidden = several;
  form.replaceChildren(...Object.entries(trial.qualities).map(([name, highest]) => scale(name, highest)));
  const actions = [button("I cannot say", () => vote({}))];
  if (!several) {
    const send = button("Next", () => vote({ scores: scores() }), true);
    send.id = "send";
    send.disabled = true;
    actions.unshift(send);
  }
  byId("actions").replaceChildren(...actions);
  byId("keys").textContent = several
    ? `Keys: 1 to ${trial.clips.length} choose a video, 0 is "I cannot say".`
    : "Keys: Tab goes to the next question, arrow keys choose, Enter sends.";
  show("trial");
  byId("prompt").focus({ preventScroll: true });
  begun = performance.now();
}

async function advance() {
  try {
    trial = await ask(`api/trial/${rater}`);
  } catch (error) {
    if (error.status === 404) {
      localStorage.removeItem(STORE);
      rater = null;
      show("welcome");
      return;
    }
    say("The server does not answer. Your answers so far are stored; reload this page to go on.");
    return;
  }
  if (trial.position >= trial.count) show("done");
  else showTrial();
}

async function vote(answer) {
  if (busy || trial === null || trial.position >= trial.count) return;
  busy = true;
  const seconds = (performance.now() - begun) / 1000;
  try {
    await ask(`api/vote/${rater}`, { position: trial.position, seconds, ...answer });
    say("");
    await advance();
  } catch (error) {
    say(`Not stored: ${error.message}. Try again.`);
  } finally {
    busy = false;
  }
}

document.addEventListener("keydown", (event) => {
  if (byId("trial").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  if (trial.mode === "ratings") {
    const send = byId("send");
    if (event.key === "Enter" && event.target.tagName !== "BUTTON" && !send.disabled) send.click();
    return;
  }
  const number = Number(event.key);
  if (event.key === "0") vote({});
  else if (number >= 1 && number <= trial.clips.length) vote({ choice: trial.clips[number - 1] });
});

byId("start").addEventListener("click", async () => {
  try {
    rater = (await ask("api/join", {})).rater;
  } catch {
    say("The server does not answer. Reload this page to try again.");
    return;
  }
  localStorage.setItem(STORE, rater);
  await advance();
});

if (rater) advance();
else show("welcome");

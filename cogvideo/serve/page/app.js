// The page: asks by /v1/videos, follows by its events. Nothing here is private to the page.
import { WORDS } from "/page/words.js";

const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const CLIP_SECONDS = 4;
const FILM_PAUSE = 600; // milliseconds a strip rests at its end
const PAGE = 12; // videos of the gallery that are loaded at a time

let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let models = [];
let begin = null; // a video of the gallery that the next one continues
let oldest = null; // the last video of the gallery, after which older ones come
const jobs = new Map(); // id -> {card, stop} of what is being generated
const chosen = []; // ids to compare, at most two

const say = (name, ...values) => {
  const words = WORDS[language][name];
  return typeof words === "function" ? words(...values) : words;
};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// -- the server --

const key = () => sessionStorage.getItem("key") || "";
const headers = (more = {}) => (key() ? { Authorization: `Bearer ${key()}`, ...more } : more);

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    $("line").textContent = say("lost");
    throw error;
  }
  $("line").textContent = "";
  if (answer.status === 401) {
    await askKey();
    return call(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error?.message || `${answer.status} ${answer.statusText}`);
  }
  return answer;
}

const tell = (error) => { $("problem").textContent = error.message; };

const callJson = async (path, options) => (await call(path, options)).json();

let asking = null;
function askKey() {
  asking ||= new Promise((resolve) => {
    $("ask-key").showModal();
    $("ask-key").addEventListener("close", () => {
      sessionStorage.setItem("key", $("key-value").value.trim());
      $("key").hidden = false;
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

const contentPath = (video, variant, index) => `/v1/videos/${video.id}/content?variant=${variant}&index=${index}`;

// With a key, files are fetched, since elements cannot send it; without, the browser loads them as it likes.
async function fileUrl(video, variant, index) {
  const path = contentPath(video, variant, index);
  if (!key()) return path;
  return URL.createObjectURL(await (await call(path)).blob());
}

// -- words --

function speak() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = say(element.dataset.hint);
  $("language").textContent = language === "en" ? "中文" : "English";
  $("language").lang = language === "en" ? "zh" : "en";
  $("examples").replaceChildren(...say("all").map((text) => make("button", { type: "button", onclick: () => write(text) }, text)));
  showFrames();
  if ($("begins").hidden === false) $("begins").textContent = say("begins");
}

function write(text) {
  $("prompt").value = text;
  $("prompt").focus();
  hint();
}

let hinting = 0;
async function hint() {
  const text = $("prompt").value;
  $("marks").textContent = "";
  const number = ++hinting;
  await new Promise((resolve) => setTimeout(resolve, 250));
  if (number !== hinting) return;
  if (!text.trim()) return $("hints").replaceChildren();
  const path = `/v1/models/${encodeURIComponent($("model").value)}/hints?prompt=${encodeURIComponent(text)}`;
  const { unknown } = await callJson(path).catch(() => ({ unknown: {} }));
  if (number !== hinting) return;
  mark(text, Object.keys(unknown));
  $("hints").replaceChildren(...Object.entries(unknown).map(([word, near]) => suggestion(word, near)));
}

function mark(text, words) {
  $("marks").replaceChildren();
  const order = [...words].sort((a, b) => b.length - a.length).map((word) => word.replace(/[^\p{L}\p{N}]/gu, "\\$&"));
  if (!order.length) return;
  for (const piece of text.split(new RegExp(`(${order.join("|")})`, "iu"))) {
    const unknown = words.includes(piece.toLowerCase()) || words.includes(piece);
    $("marks").append(unknown ? make("mark", {}, piece) : piece);
  }
}

function suggestion(word, near) {
  const line = make("p", {}, `${say("unknown")} `, make("b", {}, word), ". ");
  if (!near.length) return line;
  line.append(`${say("instead")} `);
  for (const other of near) {
    const take = () => write($("prompt").value.replace(new RegExp(word, "i"), other));
    line.append(make("button", { type: "button", class: "quiet", onclick: take }, other), " ");
  }
  return line;
}

// -- models --

const model = () => models.find((one) => one.id === $("model").value);

function showModel() {
  const now = model();
  if (!now) return;
  $("about").textContent = now.about;
  $("words").hidden = !now.words.length;
  $("known").replaceChildren(...now.words.map((word) => make("button", { type: "button", onclick: () => insert(word) }, word)));
  for (const id of ["seed", "guidance", "n", "file"]) $(id).disabled = now.deterministic;
  showFrames();
  hint();
}

function showFrames() {
  const now = model();
  if (!now) return;
  const kept = $("frames").value;
  const counts = [...now.num_frames].reverse();
  $("frames").replaceChildren(...counts.map((count) => make("option", { value: count }, say("perSecond", count, now.fps[count]))));
  if (counts.includes(Number(kept))) $("frames").value = kept;
}

function insert(word) {
  const field = $("prompt");
  const before = field.value.slice(0, field.selectionStart);
  const space = before && !/\s$/.test(before) && /^[\x20-\x7e]+$/.test(word) ? " " : "";
  field.setRangeText(space + word, field.selectionStart, field.selectionEnd, "end");
  field.focus();
  hint();
}

// -- ask --

async function ask(event) {
  event?.preventDefault();
  $("problem").textContent = "";
  if (!$("prompt").value.trim()) return $("prompt").focus();
  const now = model();
  const form = new FormData();
  const fields = { prompt: $("prompt").value, model: now.id, num_frames: $("frames").value };
  if (!now.deterministic) Object.assign(fields, { seed: $("seed").value, guidance_scale: $("guidance").value, n: $("n").value });
  for (const [name, value] of Object.entries(fields)) if (value !== "") form.append(name, value);
  $("go").disabled = true;
  try {
    if ($("file").files.length && !now.deterministic) form.append("input_reference", $("file").files[0]);
    else if (begin) form.append("input_reference", await (await call(contentPath(begin.video, "video", begin.index))).blob(), "video.mp4");
    follow(await callJson("/v1/videos", { method: "POST", body: form }));
    beginWith(null);
    $("file").value = "";
  } catch (error) {
    $("problem").textContent = error.message;
  } finally {
    $("go").disabled = false;
  }
}

function beginWith(video, index = 0) {
  begin = video && { video, index };
  $("begins").hidden = !begin;
  $("begins").textContent = begin ? say("begins") : "";
  if (begin) {
    write(video.prompt);
    $("ask").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
  }
}

// -- what is being generated --

const FIRST = "first frame";

function stepsOf(video) {
  const steps = video.input ? [] : [FIRST];
  if (video.num_frames > 1) steps.push("key frames");
  for (let frames = 5, fps = 1; fps < video.fps; ) {
    frames = 2 * frames - 1;
    fps *= 2;
    steps.push(`to ${fps} fps`);
  }
  steps.push("decode");
  return steps;
}

function stepName(step) {
  if (step === FIRST) return say("first");
  if (step === "key frames") return say("key_frames");
  if (step === "decode") return say("sharpen");
  const fps = Number(step.match(/\d+/)?.[0] || 1);
  return say("doubled", fps * CLIP_SECONDS + 1);
}

function follow(video) {
  if (jobs.has(video.id)) return;
  const steps = video.model === "direct-tiny" || model()?.deterministic ? [] : stepsOf(video);
  const list = make("ol", { class: "steps" }, ...steps.map((step) => make("li", {}, stepName(step))));
  const bar = make("progress", { max: 100, value: 0, "aria-label": video.prompt });
  const play = make("canvas", { class: "play", width: 192, height: 192, role: "img", "aria-label": say("preview", video.prompt) });
  const strip = make("div", { class: "strip", "aria-hidden": "true" });
  const state = make("span", { class: "label" }, say("queued"));
  const cancel = make("button", { class: "quiet", onclick: () => forget(video) }, say("cancel"));
  const card = make("article", { class: "job", id: video.id },
    make("div", {}, play),
    make("div", { class: "about" }, make("p", { class: "text" }, video.prompt), list, bar,
      make("div", { class: "row" }, state, cancel), strip));
  $("now").append(card);
  $("now-part").hidden = false;
  const film = new Film(play, strip);
  const control = new AbortController();
  jobs.set(video.id, { card, stop: () => { control.abort(); film.stop(); } });

  const progress = (now) => {
    bar.value = now.progress;
    const at = steps.indexOf(now.stage);
    list.querySelectorAll("li").forEach((item, i) => {
      item.classList.toggle("done", i < at);
      item.toggleAttribute("aria-current", i === at);
    });
    const seed = now.seed == null ? "" : say("seedIs", now.seed);
    state.textContent = now.status === "queued" ? say("queued") : `${now.progress} %  ${seed}`;
    if (now.status === "completed" || now.status === "failed") finish(now);
  };
  listen(video.id, control.signal, { progress, preview: (now) => film.show(now), deleted: () => leave(video.id) });
}

function leave(id) {
  const job = jobs.get(id);
  if (!job) return;
  job.stop();
  job.card.remove();
  jobs.delete(id);
  $("now-part").hidden = jobs.size === 0;
}

function finish(video) {
  if (!jobs.has(video.id)) return;
  leave(video.id);
  if (video.error?.code === "cancelled") return;
  show(video, true);
  $("problem").textContent = "";
  document.title = `✓ ${video.prompt}`;
  setTimeout(() => { document.title = "cogvideo"; }, 4000);
}

async function forget(video) {
  await call(`/v1/videos/${video.id}`, { method: "DELETE" }).catch(() => {});
  leave(video.id);
  document.getElementById(`made-${video.id}`)?.remove();
  $("none").hidden = $("made").children.length > 0;
}

// Follow the events of a video; after a broken line, again, until it is finished.
async function listen(id, signal, handlers) {
  for (let pause = 500; !signal.aborted; pause = Math.min(5000, 2 * pause)) {
    try {
      const answer = await call(`/v1/videos/${id}/events`, { signal });
      for await (const [name, data] of events(answer.body)) {
        pause = 500;
        handlers[name]?.(data);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (/no video/.test(error.message)) return handlers.deleted();
    }
    if (!signal.aborted) await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const name = block.match(/^event: (.*)$/m)?.[1];
      const data = block.match(/^data: (.*)$/m)?.[1];
      if (name && data) yield [name, JSON.parse(data)];
    }
  }
}

// The frames so far: all of them as a strip, and played over as many seconds as the video has.
class Film {
  constructor(play, strip) {
    this.play = play;
    this.strip = strip;
    this.tiles = [];
    this.started = performance.now();
    this.tick = this.tick.bind(this);
    this.frame = requestAnimationFrame(this.tick);
  }

  stop() {
    cancelAnimationFrame(this.frame);
  }

  async show({ frames, image }) {
    const sheet = new Image();
    sheet.src = image;
    await sheet.decode();
    const side = sheet.height;
    const before = this.tiles.length;
    const known = [];
    for (let i = 0; i < frames; i++) {
      const tile = make("canvas", { width: side, height: side, title: say("frame", i + 1) });
      tile.getContext("2d").drawImage(sheet, i * side, 0, side, side, 0, 0, side, side);
      if (before && frames > before && i % 2 === 1) tile.classList.add("new");
      known.push(tile);
    }
    this.tiles = known.map((tile) => ({ tile, ...state(tile) }));
    this.strip.replaceChildren(...known);
    if (before !== frames) this.started = performance.now();
  }

  tick(now) {
    const whole = this.tiles.filter((one) => one.whole);
    const ready = whole.length ? whole : this.tiles.filter((one) => one.begun);
    if (ready.length) {
      const length = 1000 * CLIP_SECONDS;
      const time = calm.matches ? 0 : (now - this.started) % (length + FILM_PAUSE);
      const slot = Math.min(this.tiles.length - 1, Math.floor((time / length) * this.tiles.length));
      const at = this.tiles.slice(0, slot + 1).reverse().find((one) => ready.includes(one)) || ready[0];
      const context = this.play.getContext("2d");
      context.clearRect(0, 0, this.play.width, this.play.height);
      context.drawImage(at.tile, 0, 0, this.play.width, this.play.height);
    }
    this.frame = requestAnimationFrame(this.tick);
  }
}

// Whether a frame has begun, and whether all of it is there: what is not yet is transparent.
function state(tile) {
  const { data } = tile.getContext("2d").getImageData(0, 0, tile.width, tile.height);
  let opaque = 0;
  let count = 0;
  for (let i = 3; i < data.length; i += 4 * 37) {
    opaque += data[i] > 0;
    count += 1;
  }
  return { begun: opaque > 0, whole: opaque === count };
}

// -- what was generated --

function show(video, first) {
  document.getElementById(`made-${video.id}`)?.remove();
  const group = make("div", { id: `made-${video.id}`, class: "group" });
  if (video.status === "failed") group.append(failedCard(video));
  else for (let i = 0; i < video.n; i++) group.append(clipCard(video, i));
  if (first) $("made").prepend(group);
  else $("made").append(group);
  $("none").hidden = true;
}

function failedCard(video) {
  return make("article", { class: "clip" }, make("p", {}, video.prompt),
    make("p", { class: "bad" }, `${say("failed")}: ${video.error.message}`),
    make("div", { class: "actions" }, make("button", { onclick: () => forget(video) }, say("remove"))));
}

function clipCard(video, index) {
  const player = make("video", { loop: true, muted: true, playsinline: true, controls: calm.matches, "aria-label": say("video", video.prompt), tabindex: 0 });
  player.muted = true;
  fileUrl(video, "thumbnail", index).then((url) => { player.poster = url; }, tell);
  fileUrl(video, "video", index).then((url) => { player.src = url; }, tell);
  player.addEventListener("click", () => (player.paused ? player.play() : player.pause()));
  player.addEventListener("keydown", (event) => { if (event.key === " ") { event.preventDefault(); player.click(); } });
  watcher.observe(player);
  const seed = video.seed == null ? null : video.seed + index;
  const more = async () => {
    const fields = { prompt: video.prompt, model: video.model, num_frames: video.num_frames, guidance_scale: video.guidance_scale };
    follow(await callJson("/v1/videos", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields) }));
    $("now-part").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
  };
  const still = video.num_frames === 1 || seed == null;
  const actions = make("div", { class: "actions" },
    download(video, index, "video", "mp4"), download(video, index, "gif", "gif"),
    seed == null ? null : make("button", { onclick: () => more().catch(tell) }, say("again")),
    still ? null : make("button", { onclick: () => beginWith(video, index) }, say("goOn")),
    make("button", { onclick: () => forget(video) }, say("remove")));
  const box = make("input", { type: "checkbox", onchange: (event) => choose(`${video.id}/${index}`, event.target.checked, video, index) });
  return make("article", { class: "clip" }, player, make("p", {}, video.prompt),
    make("p", { class: "label" }, [video.model, seed == null ? null : say("seedIs", seed)].filter(Boolean).join(" · ")),
    make("label", {}, box, say("choose")), actions);
}

function download(video, index, variant, name) {
  const link = make("a", { href: contentPath(video, variant, index), download: `${video.id}.${name}` }, name);
  link.addEventListener("click", async (event) => {
    if (!key() || link.href.startsWith("blob:")) return;
    event.preventDefault();
    link.href = await fileUrl(video, variant, index);
    link.click();
  });
  return link;
}

// Videos play while they can be seen.
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !calm.matches) target.play().catch(() => {});
    else target.pause();
  }
});

function choose(name, on, video, index) {
  const at = chosen.findIndex((one) => one.name === name);
  if (on) chosen.push({ name, video, index });
  else if (at >= 0) chosen.splice(at, 1);
  $("compare").hidden = chosen.length !== 2;
}

async function compare() {
  const figures = [];
  for (const { video, index } of chosen) {
    const player = make("video", { loop: true, playsinline: true, controls: true, "aria-label": say("video", video.prompt) });
    player.muted = true;
    player.src = await fileUrl(video, "video", index);
    const seed = video.seed == null ? "" : ` · ${say("seedIs", video.seed + index)}`;
    figures.push(make("figure", {}, player, make("figcaption", {}, video.prompt, make("span", { class: "label" }, seed))));
  }
  $("pair-clips").replaceChildren(...figures);
  $("pair").showModal();
  playPair();
}

function playPair() {
  for (const player of $("pair-clips").querySelectorAll("video")) {
    player.currentTime = 0;
    player.play().catch(() => {});
  }
}

async function older() {
  const after = oldest ? `&after=${oldest}` : "";
  const page = await callJson(`/v1/videos?limit=${PAGE}${after}`);
  for (const video of page.data) {
    if (video.status === "completed" || video.status === "failed") show(video, false);
    else follow(video);
  }
  oldest = page.last_id || oldest;
  $("more").hidden = !page.has_more;
}

// -- begin --

$("ask").addEventListener("submit", ask);
$("prompt").addEventListener("input", hint);
$("prompt").addEventListener("scroll", () => { $("marks").scrollTop = $("prompt").scrollTop; });
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event); });
$("file").addEventListener("change", () => beginWith(null));
$("model").addEventListener("change", showModel);
$("compare").addEventListener("click", () => compare().catch(tell));
$("pair-close").addEventListener("click", () => $("pair").close());
$("pair-play").addEventListener("click", playPair);
$("more").addEventListener("click", () => older().catch(tell));
$("key").addEventListener("click", askKey);
$("language").addEventListener("click", () => {
  language = language === "en" ? "zh" : "en";
  localStorage.setItem("language", language);
  speak();
});

async function start() {
  speak();
  for (let pause = 500; ; pause = Math.min(5000, 2 * pause)) {
    try {
      models = (await callJson("/v1/models")).data;
      break;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }
  $("model").replaceChildren(...models.map((one) => make("option", { value: one.id }, one.id)));
  showModel();
  await older().catch(tell);
}

start();

"""What the original's inference does otherwise than its training, in one place (docs/reference.md,
"Inference").

With `reference_quirks` generation repeats it:
- The last token of the first frame is sampled with the options of stage 1, not with those of the image model.
- In stage 2 the given frames see each other across the border of the map, since the original rolls the
  windows of a shifted layer without a mask (`Layout.reference`).
- Where text is boosted, the temporal channel boosts it in the steps only, not in the prompt
  (`SequenceView.attend`).
"""

from collections.abc import Mapping
from dataclasses import replace

from cogvideo.generate.sampling import Sampling
from cogvideo.layout import Layout


def reference_layout(layout: Layout) -> Layout:
    """The layout with the masks of the original's inference."""
    return replace(layout, reference=True)


def last_token(sampling: Mapping[str, Sampling]) -> Sampling:
    """How the original samples the last token of the first frame, of the options of all stages."""
    return sampling["stage1"]

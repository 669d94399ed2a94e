"""Rivals trained on the same world for the same time, judged by the same judges.

    python -m benchmarks.rivals train ours --minutes 60           resumes after it was killed
    python -m benchmarks.rivals train raster --minutes 60
    python -m benchmarks.rivals judge                             all that are trained: a table and a sheet

Systems:
    ours        base, then both stages: half of the time, a quarter and a quarter
    still       the floor: the first frame of ours, repeated
    regression  the regression family: first frame, 5 frames, 33 frames, by the hierarchical loss
    raster      a plain GPT of the same blocks over the codes of all 33 frames in raster order: no second
                channel, no hierarchy, no diagonals
    diffusion   a transformer that denoises all frames at once, as CogVideoX does; needs `diffusers`
    phenaki     C-ViViT and MaskGIT; needs `phenaki-pytorch`
    random, one-stage-1, one-stage-2, unfrozen, unwindowed: the paper's ablations, in `ablations.py`

The packages of other people are in requirements.txt beside this file, apart from those of the project.

All but regression and phenaki use the tokenizer of the shipped model, whose training does not count, frame by
frame, without the video decoder. All have 4 layers of width 256 and learn the first 12 sprites; prompts are
about held-out compositions. Time is that of one processor core. Each system writes videos, and
`cogvideo.eval` judges all of them in the same way.
"""

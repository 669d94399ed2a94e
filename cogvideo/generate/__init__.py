"""Generate: a sentence becomes a clip.

pipeline     what every loaded model can do
cogvideo     key frames, rounds of interpolation, decoding, as methods over a `Draft`; and `load`
regression   all frames in one pass
fill         tokens one after another, with a cache
sampling     from logits to a token
prompts      checks, hints and ids of prompts
draft        clips as tokens, and where an interrupted call finds them
parts        the stored parts of a model, each loaded when first needed
int8         linear layers as a CPU computes them fastest
cost         steps, bytes and memory, as arithmetic
estimate     seconds on this machine
bulk         many videos, in processes or on a cluster
torchrun     several processes: their own prompts, or slices of the matrices
publish      a folder ready for the hub
reference    what the original's inference does otherwise than its training
"""

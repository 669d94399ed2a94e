"""Model: what is learnt, and how it is stored.

transformer   the text-to-image base, the temporal channels, and the two together
attention     the two attention channels of a block
groups        which tokens attend together, as tensors
matrix_attention   attention as matrix products, for training on a CPU
cache         keys and values of generated tokens
vqvae         the frame tokenizer
decoder       codes of a clip to frames, each with its neighbours and the caption
refiner       decoded frames to larger ones
superres      codes to more codes
regression    the encoder-decoder transformer of the regression family
features      frozen feature networks, for losses and metrics
config        frozen dataclasses from JSON: types, ranges, errors that name the key
families      the parts of a model and their sizes
presets       one table of models
lora          low-rank adapters of some parts
card          model cards
hub           models and adapters on the hub
folder        a model as a folder of safetensors, and its config.json
"""

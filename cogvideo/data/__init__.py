"""Data: captioned videos become batches.

sources     tiny world, folders, tables, YouCook2, shards: where captioned videos come from
videos      one captioned video file
cut         a clip out of a video, at one of several frame rates
loader      batches of frames
survey      what a training would read of a user's videos
coded       videos as codes, in shards
tokens      batches of codes, from clips that recur
tinyworld/  scenes drawn from a seed, with captions
"""

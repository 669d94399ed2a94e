"""Convert: foreign files become a model folder.

sat        reads checkpoint folders and zips of the original
keys       key rules: their tensors to ours, strictly
cogvideo   the released CogVideo and its super-resolution
icetk      the original's tokenizer of text and images
gpt2       GPT-2's word embedding
"""

"""Evaluate: numbers about clips.

metrics   Frechet distance, PSNR, SSIM, sharpness, flicker
"""

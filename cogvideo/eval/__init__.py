"""Evaluate: measures of clips.

metrics   Frechet distance, PSNR, SSIM, sharpness, flicker
"""

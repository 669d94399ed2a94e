"""Campaigns against bad input and against loss."""

"""Keeping books of experiments: constants, folders, checkpoints, results, plots. A student may skip this folder."""

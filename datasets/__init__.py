"""Where images come from and how they reach the network. Nothing of Hugging Face's `datasets`.

This file makes the folder a package, which Python takes before an installed one of the same name when a script
beside it is run. In a notebook that has imported the other `datasets` already, restart the kernel.
"""

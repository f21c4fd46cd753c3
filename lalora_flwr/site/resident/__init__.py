"""A process of a real site that keeps imports, frozen model and records from one message to the next.

Flower starts a process for every message. That process hands the message over a Unix socket to the resident trainer
(`hand_over`), which does the site's work (`trainer`) and gives back what the reply says; only the short process ever replies.
Nothing in here but `trainer.Trainer.work` knows what the work is, and no module imports torch.
"""

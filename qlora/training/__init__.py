"""The run: its folder, guards, the Trainer, before and after, the report."""

"""`looptap.watch`: what `looptap.capture` measures, of any torch.nn.Module as it is."""

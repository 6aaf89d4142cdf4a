"""The LM head: hidden rows to log-probs or a preference loss, without whole logits."""

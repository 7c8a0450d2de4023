"""One language model: loading, tokenizer, prompts, head, padded batches, forward, scoring, generation."""

"""Conversations with a language model: the tokenizer of its folder, and turns as tokens."""

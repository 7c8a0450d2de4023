"""The diagnostic: what was learnable in a bank of fixed contexts, and did a signal predict it?"""

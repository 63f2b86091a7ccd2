"""Hugging Face side: these files need torch and transformers only and travel with an export."""

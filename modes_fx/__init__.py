"""Skip the experts that do not matter: MoDES for mixture-of-experts multimodal LLMs, as a compiler pass."""

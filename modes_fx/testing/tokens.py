"""The vocabulary that all tiny models share: ids below 8 mean something, the others are words."""

PAD, BOS, EOS, VISION_START, VISION_END, IMAGE, VIDEO, AUDIO = range(8)
SPECIAL = (BOS, EOS, PAD, VISION_START, VISION_END)
VOCABULARY = 96

"""A segmentor looked at in the browser: a page of this machine's own, which takes an image and shows its labels."""

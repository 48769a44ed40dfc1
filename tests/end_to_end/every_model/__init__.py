"""A tiny segmentor around each backbone, neck and decode head of mmseg's registry, and a short run of it."""

"""What every experiment shares: how often to log, and where to. Values beyond this come from the command line
(--load-from, --resume)."""

log_config = dict(
    interval=50,
    hooks=[dict(type="TextLoggerHook", by_epoch=False), dict(type="TensorboardLoggerHook")],
)
log_level = "INFO"
load_from = None
resume_from = None

"""What a run logs of itself while it goes: metrics, speed, stragglers, traces, curves."""

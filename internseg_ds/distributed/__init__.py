"""What ZeRO needs of a segmentor: processes, the checked ds_config, construction under `zero.Init`, precision, parameter groups, gathering."""

"""The library: functions on modules and loaders, without run directories and settings; the pipelines use them too."""

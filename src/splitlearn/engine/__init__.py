"""The one thread that owns the device, the trunk and all that changes on it; knows torch and no network."""

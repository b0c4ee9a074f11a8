"""From a training run to something deployable: the bundle, its checks and its copies for servers.

Nothing is imported here, so that the engine can read bundles with `hrpro.export.bundle` without
loading torch.
"""

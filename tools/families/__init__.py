"""Do the bundles of all families answer as transformers does, of this release and of an older one?"""

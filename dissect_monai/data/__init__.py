"""Files to items: data lists, splits, readers, data sets, samplers."""

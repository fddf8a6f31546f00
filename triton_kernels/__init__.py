"""Custom Triton kernels; import them as `diffpref.triton_kernels`.

The folder lies at the top of the repository, but the import name `triton_kernels` belongs to the Triton project. With
the repository's root on `sys.path` this folder would shadow that package, so it refuses to be imported under that name.
"""

if __name__ == "triton_kernels":  # reached by folder name, not by package name
    reason = "this folder is diffpref.triton_kernels, not the Triton project's triton_kernels"
    raise ModuleNotFoundError(reason, name=__name__)

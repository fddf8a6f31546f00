"""The subcommands of `diffpref`, one file each with a function run(arguments), which imports torch and not before."""

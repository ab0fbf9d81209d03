# `make help` lists what there is. Without make (Windows): the same names with `python tasks.py NAME`.
PYTHON ?= python3

.PHONY: help demo test check nightly smoke newest gui bench cpu
help demo test check nightly smoke newest gui bench cpu:
	@$(PYTHON) tasks.py $@

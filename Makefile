# The newcomer's entries. Everything else is `cargo xtask`.
#
#   make demo       build Mica and a tiny guest, and watch it boot
#   make test       everything a change must pass, in less than half an hour
#   make test-deep  the same with long fuzzing and benches

export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: demo test test-deep

demo:
	@xtask/setup
	@cargo xtask demo

test:
	@xtask/setup
	@cargo xtask test

test-deep:
	@xtask/setup
	@cargo xtask test --deep

# Two commands do all the work: `make up` runs Terrace, `make test` checks it.
# Each first sets up what it needs (tools/dev/setup says what, and why).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Where the state of `make up` lives, the port of its front door, and further options of `terrace up`,
# for example: make up ARGS='--decode 2 --pinned-bytes 1GiB'
STATE ?= .terrace
PORT ?= 8080
ARGS ?=
# Suites of `make bench`.
SUITES ?= ttft restart worker lease local

TARGET := $(or $(CARGO_TARGET_DIR),target)
export PATH := $(CURDIR)/.venv/bin:$(PATH):$(HOME)/.cargo/bin

# Paths of librocksdb and libclang, where this machine keeps them elsewhere than .cargo/config.toml says.
NATIVE = native=$$(tools/dev/native-env); eval "$$native"
BUILD = $(NATIVE); cargo build --release --locked --workspace --bins

.PHONY: help up test test-vllm bench build setup setup-test fmt clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: setup ## build and run everything on loopback, in the foreground; Ctrl-C stops it
	@$(BUILD)
	@exec $(TARGET)/release/terrace up --home '$(STATE)' --port '$(PORT)' $(ARGS)

test: setup-test ## everything that CI checks: format, lints, wire contract, licences, tests
	@$(NATIVE); exec tools/dev/check

test-vllm: setup-test ## run vLLM with Terrace on the CPU (installs 6 GB once; PARTS=ttft,restart)
	@exec tools/dev/test-vllm $(PARTS)

bench: setup ## run the benchmarks (SUITES='ttft lease'), each on its own temporary state
	@$(BUILD)
	@for suite in $(SUITES); do $(TARGET)/release/terrace bench $$suite $(ARGS); done

build: setup ## build the programs into target/release
	@$(BUILD)

setup: ## install what building and running need
	@tools/dev/setup run

setup-test: ## install what testing needs besides
	@tools/dev/setup test

fmt: ## format all sources
	@cargo fmt --all

clean: ## remove build products (state in .terrace and the model cache stay)
	@cargo clean
	@rm -rf .venv

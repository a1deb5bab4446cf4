# `make serve` and `make test` are all it takes: each makes .venv first, or brings it up to date.

VENV := .venv
INSTALLED := $(VENV)/installed
BIN := $(VENV)/bin

.PHONY: serve test lint
.DELETE_ON_ERROR:

serve: $(INSTALLED)  ## HOST=…, PORT=… and ARGS='…' go to farthing serve
	@exec $(BIN)/farthing serve $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

test: lint  ## ARGS='…' goes to pytest
	$(BIN)/pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(INSTALLED): constraints.txt pyproject.toml scripts/make-venv
	@scripts/make-venv $(VENV)
	@touch $@

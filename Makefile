# make demo        set up, make phantoms, train on them, score the model, then compare hospitals alone, a federation and one
#                  central model (Linux and macOS; docs/tutorial.md has the steps for Windows)
# make test        set up, then linter, types and every test
# make test-quick  linter, types and the fast tests, for daily work
# make federated   set up, then a server and two hospitals on the phantoms
# make app         set up, then the web page for a clinician, at http://localhost:8501
# make browser-demo  set up, then the page that runs the newest model in the browser, at http://127.0.0.1:8600 (needs Node.js)
# make archive-demo  set up, then a hospital's archive (Debian's Orthanc) with phantoms: prepare from it, predict, send back
# make docs        the site of docs/, in site/
# make lock        pin all packages by SHA-256 again, in requirements/*.lock
# make audit       known weaknesses of packages (needs the advisories' servers), and secrets in the repository
# make sbom        what is installed, as CycloneDX: sbom.json, sbom-browser.json
# make digests     pin the images' base by its digest (needs Docker and its registry)
# make benchmark   throughput, memory and input pipeline of a training, measured here
# make help        this list

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PHANTOMS := data/phantoms
DEMO := models/demo
STUDY := models/study

LIBRARIES := deployment/browser/node_modules/.package-lock.json
VIEWER := deployment/viewer/node_modules/.package-lock.json

.DEFAULT_GOAL := demo

help:
	@sed -n 's/^# \(make .*\|   .*\)/\1/p' Makefile

.PHONY: help demo federated app archive-demo browser-demo browser-libraries test test-quick lint system orthanc docs benchmark lock audit secrets sbom digests

demo: $(VENV)/installed
	$(RUN) data/make_phantoms.py --out $(PHANTOMS)
	$(RUN) train_centralized.py --data-dir $(PHANTOMS) --out $(DEMO) --minutes 1.5 --overwrite
	$(RUN) evaluate.py --checkpoint $(DEMO)/transunet_centralized_best.pth --data-dir $(PHANTOMS) --write-back \
		--json $(DEMO)/scores.json --csv $(DEMO)/scores.csv --overlays $(DEMO)/overlays
	rm -rf $(STUDY)
	$(RUN) benchmarks/federated_study.py demo --data-dir $(PHANTOMS) --out $(STUDY)
	@echo "wrote $(DEMO)/transunet_centralized_best.pth, $(DEMO)/centralized_history.csv, $(DEMO)/centralized_curves.png"
	@echo "look at it: make app, or make browser-demo (needs Node.js)"

federated: $(VENV)/installed
	$(RUN) data/make_phantoms.py --out $(PHANTOMS)
	@$(RUN) run_client.py --cid 0 --data-dir $(PHANTOMS) & one=$$!; $(RUN) run_client.py --cid 1 --data-dir $(PHANTOMS) & two=$$!; \
	trap 'kill $$one $$two' INT TERM; $(RUN) run_server.py --out models/federated --overwrite; code=$$?; \
	[ $$code = 0 ] || kill $$one $$two; wait; exit $$code

test: lint system
	@command -v npm >/dev/null && $(MAKE) --no-print-directory browser-libraries \
		|| echo "no Node.js here, or no package registry: the tests of the page in the browser will be skipped"
	$(RUN) -m pytest

# A Chromium for the pages' tests, an nginx for the gateway's, an Orthanc and a checker of DICOM for the archive's: taken if they are there, installed where that is allowed (Debian,
# as root), else done without. Where services run, nginx and Orthanc are left to you: their packages would start them.
INSTALL := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update \
	&& DEBIAN_FRONTEND=noninteractive apt-get -qq install -y >/dev/null
system:
	@command -v chromium chromium-browser google-chrome >/dev/null || { $(INSTALL) chromium; } \
		|| echo "no Chromium here: the browser tests will be skipped"
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v nginx >/dev/null || { [ ! -d /run/systemd/system ] && $(INSTALL) nginx; } \
		|| echo "no nginx here: the gateway's tests will be skipped"
	@$(MAKE) --no-print-directory orthanc || echo "no Orthanc here: the tests against an archive will be skipped"
	@command -v dciodvfy >/dev/null || { $(INSTALL) --no-install-recommends dicom3tools; } \
		|| echo "no dciodvfy here: the form of what goes back to an archive will not be checked"

orthanc:
	@[ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] \
		|| { [ ! -d /run/systemd/system ] && $(INSTALL) --no-install-recommends orthanc orthanc-dicomweb; }

archive-demo: $(VENV)/installed-dev
	@$(MAKE) --no-print-directory orthanc || { echo "install Debian's orthanc and orthanc-dicomweb"; exit 2; }
	$(RUN) data/make_phantoms.py --out $(PHANTOMS)
	[ -e $(DEMO)/transunet_centralized_best.pth ] \
		|| $(RUN) train_centralized.py --data-dir $(PHANTOMS) --out $(DEMO) --minutes 1.5
	$(RUN) benchmarks/archive_demo.py --checkpoint $(DEMO)/transunet_centralized_best.pth

app: $(VENV)/installed
	$(RUN) -m streamlit run deployment/app/app.py

browser-demo: $(VENV)/installed-export browser-libraries
	$(RUN) deployment/serve_browser.py

browser-libraries: $(LIBRARIES) $(VIEWER)

# The libraries of the page in the browser, as deployment/browser/package-lock.json pins them; no script of theirs is run.
$(LIBRARIES): deployment/browser/package-lock.json
	@command -v npm >/dev/null || { echo "the page in the browser needs Node.js 20 or newer, for npm; install it"; exit 2; }
	npm ci --prefix deployment/browser --ignore-scripts --no-audit --no-fund --loglevel error
	touch $@

# What the viewer of both pages is built from and tested with. The built file is in the repository: `npm run build` in deployment/viewer
# after a change, and a test compares.
$(VIEWER): deployment/viewer/package-lock.json
	@command -v npm >/dev/null || { echo "the viewer's tests need Node.js 20 or newer, for npm; install it"; exit 2; }
	npm ci --prefix deployment/viewer --ignore-scripts --no-audit --no-fund --loglevel error
	touch $@

test-quick: lint
	$(RUN) -m pytest -m "not slow"

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check -q .
	$(RUN) -m mypy

docs: $(VENV)/installed-dev
	$(RUN) docs/make_reference.py
	$(RUN) -m mkdocs build --strict --quiet

benchmark: $(VENV)/installed-dev
	$(RUN) benchmarks/throughput.py

# What looks at the supply chain has an environment of its own: its packages are not MedFL's.
TOOLS := .venv-audit
$(TOOLS)/installed: requirements/audit.lock
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q --require-hashes --no-deps -r requirements/audit.lock
	touch $@

lock: $(TOOLS)/installed
	PATH="$(TOOLS)/bin:$$PATH" python requirements/lock.py

secrets: $(TOOLS)/installed
	git ls-files -z | xargs -0 $(TOOLS)/bin/detect-secrets-hook --baseline .secrets.baseline

audit: secrets
	for lock in main federation dicom space dev audit torch; do \
		$(TOOLS)/bin/pip-audit --disable-pip --require-hashes -r requirements/$$lock.lock || exit 1; done
	npm audit --prefix deployment/browser

sbom: $(TOOLS)/installed
	$(TOOLS)/bin/cyclonedx-py requirements --of JSON -o sbom.json requirements/federation.lock
	npm sbom --prefix deployment/browser --package-lock-only --sbom-format cyclonedx > sbom-browser.json

BASE := python:3.11-slim-bookworm
digests:
	digest=$$(docker buildx imagetools inspect $(BASE) --format '{{.Manifest.Digest}}') \
		&& sed -i.bak "s|^ARG BASE=.*|ARG BASE=$(BASE)@$$digest|" deployment/*/Dockerfile && rm deployment/*/Dockerfile.bak

# One call of pip: only then does it choose a torchvision that fits the pinned torch.
$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MedFL needs Python 3.11 or newer; name one with make PYTHON=...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/installed-export: $(VENV)/installed requirements-export.txt
	$(RUN) -m pip install -q -r requirements-export.txt
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-export.txt requirements-simulation.txt requirements-privacy.txt \
		requirements-dicom.txt requirements-download.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MedFL needs Python 3.11 or newer; name one with make PYTHON=...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@ $(VENV)/installed $(VENV)/installed-export

"""The licences a model card on the Hub can name, and whether each lets an unmodified copy of the weights be published.

The identifiers are the Hub's own (huggingface.co/docs/hub/repositories-licenses, August 2026) and the `license_name`
values that diffusion models give under `license: other`. `copies` is our reading of the licence's text and no legal
advice: true where anyone who received the weights may put verbatim copies into another public repository, next to
changed code; `note` names the condition, or what stands against it. What is not here (`unknown`, `other`, a name whose
text we could not read) is unknown, and the caller refuses it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from surgery.errors import PublishError


@dataclass(frozen=True)
class License:
    """A licence, its identifier in lower case, and whether verbatim copies of the weights may be published.

    listed: whether a card may say `license: id`; else it says `license: other` and `license_name: id`.
    """

    id: str
    name: str
    copies: bool
    link: str | None
    note: str = ""
    listed: bool = True


_SITES = {
    "cc": "https://creativecommons.org/{}/",
    "github": "https://github.com/{}",
    "gnu": "https://www.gnu.org/licenses/{}.html",
    "hf": "https://huggingface.co/{}",
    "https": "https:{}",
    "spdx": "https://spdx.org/licenses/{}.html",
}

_NAMES_OF_OTHER = (
    "circlestone-labs-non-commercial-license",
    "fair-ai-public-license-1.0-sd",
    "faipl-1.0-sd",
    "flux-1-dev-non-commercial-license",
    "flux-dev-non-commercial-license",
    "flux-non-commercial-license",
    "krea-2-community-license",
    "ltx-2-community-license-agreement",
    "nvidia-open-model-license",
    "playground-v2-community",
    "playground-v2dot5-community",
    "sai-nc-community",
    "stable-audio-community",
    "stable-cascade-nc-community",
    "stable-video-diffusion-community",
    "stabilityai-ai-community",
    "stabilityai-nc-research-community",
    "tencent-hunyuan-community",
)

# Under `copies: note` or `no copies: note`, the licences: identifier | name | link, where there is one to give.
_TABLE = """
copies:
  cc0-1.0 | Creative Commons Zero v1.0 Universal | cc:publicdomain/zero/1.0
  pddl | Open Data Commons Public Domain Dedication and License | spdx:PDDL-1.0
  unlicense | The Unlicense | spdx:Unlicense
  wtfpl | Do What The F*ck You Want To Public License | spdx:WTFPL

copies: keep the licence and its notices
  afl-3.0 | Academic Free License v3.0 | spdx:AFL-3.0
  apache-2.0 | Apache License 2.0 | spdx:Apache-2.0
  apple-ascl | Apple Sample Code License
  artistic-2.0 | Artistic License 2.0 | spdx:Artistic-2.0
  bsd | BSD license family
  bsd-2-clause | BSD 2-Clause License | spdx:BSD-2-Clause
  bsd-3-clause | BSD 3-Clause License | spdx:BSD-3-Clause
  bsd-3-clause-clear | BSD 3-Clause Clear License | spdx:BSD-3-Clause-Clear
  bsl-1.0 | Boost Software License 1.0 | spdx:BSL-1.0
  cdla-permissive-1.0 | Community Data License Agreement, Permissive, 1.0 | spdx:CDLA-Permissive-1.0
  cdla-permissive-2.0 | Community Data License Agreement, Permissive, 2.0 | spdx:CDLA-Permissive-2.0
  ecl-2.0 | Educational Community License v2.0 | spdx:ECL-2.0
  isc | ISC License | spdx:ISC
  lppl-1.3c | LaTeX Project Public License v1.3c | spdx:LPPL-1.3c
  mit | MIT License | spdx:MIT
  ms-pl | Microsoft Public License | spdx:MS-PL
  ncsa | University of Illinois/NCSA Open Source License | spdx:NCSA
  nvidia-open-model-license | NVIDIA Open Model License Agreement
  openmdw-1.0 | Open Model, Data & Weights License Agreement 1.0 | https://openmdw.ai/license/1-0/
  openmdw-1.1 | Open Model, Data & Weights License Agreement 1.1 | https://openmdw.ai/license/1-1/
  postgresql | PostgreSQL License | spdx:PostgreSQL
  zlib | zlib License | spdx:Zlib

copies: attribution
  cc-by-2.0 | Creative Commons Attribution 2.0 | cc:licenses/by/2.0
  cc-by-2.5 | Creative Commons Attribution 2.5 | cc:licenses/by/2.5
  cc-by-3.0 | Creative Commons Attribution 3.0 | cc:licenses/by/3.0
  cc-by-4.0 | Creative Commons Attribution 4.0 | cc:licenses/by/4.0
  etalab-2.0 | Etalab Open License 2.0 | spdx:etalab-2.0
  odc-by | Open Data Commons Attribution License family | spdx:ODC-By-1.0

copies: attribution, adaptations under the same licence
  cc-by-sa-3.0 | Creative Commons Attribution ShareAlike 3.0 | cc:licenses/by-sa/3.0
  cc-by-sa-4.0 | Creative Commons Attribution ShareAlike 4.0 | cc:licenses/by-sa/4.0

copies: attribution, non-commercial
  cc-by-nc-2.0 | Creative Commons Attribution NonCommercial 2.0 | cc:licenses/by-nc/2.0
  cc-by-nc-3.0 | Creative Commons Attribution NonCommercial 3.0 | cc:licenses/by-nc/3.0
  cc-by-nc-4.0 | Creative Commons Attribution NonCommercial 4.0 | cc:licenses/by-nc/4.0

copies: attribution, non-commercial, adaptations under the same licence
  cc-by-nc-sa-2.0 | Creative Commons Attribution NonCommercial ShareAlike 2.0 | cc:licenses/by-nc-sa/2.0
  cc-by-nc-sa-3.0 | Creative Commons Attribution NonCommercial ShareAlike 3.0 | cc:licenses/by-nc-sa/3.0
  cc-by-nc-sa-4.0 | Creative Commons Attribution NonCommercial ShareAlike 4.0 | cc:licenses/by-nc-sa/4.0

copies: pass on under the same licence
  agpl-3.0 | GNU Affero General Public License v3.0 | gnu:agpl-3.0
  cdla-sharing-1.0 | Community Data License Agreement, Sharing, 1.0 | spdx:CDLA-Sharing-1.0
  epl-1.0 | Eclipse Public License 1.0 | spdx:EPL-1.0
  epl-2.0 | Eclipse Public License 2.0 | spdx:EPL-2.0
  eupl-1.1 | European Union Public License 1.1 | spdx:EUPL-1.1
  eupl-1.2 | European Union Public License 1.2 | spdx:EUPL-1.2
  gfdl | GNU Free Documentation License family | gnu:fdl-1.3
  gpl | GNU General Public License family
  gpl-2.0 | GNU General Public License v2.0 | gnu:old-licenses/gpl-2.0
  gpl-3.0 | GNU General Public License v3.0 | gnu:gpl-3.0
  lgpl | GNU Lesser General Public License family
  lgpl-2.1 | GNU Lesser General Public License v2.1 | gnu:old-licenses/lgpl-2.1
  lgpl-3.0 | GNU Lesser General Public License v3.0 | gnu:lgpl-3.0
  lgpl-lr | Lesser General Public License For Linguistic Resources | spdx:LGPLLR
  mpl-2.0 | Mozilla Public License 2.0 | spdx:MPL-2.0
  odbl | Open Database License family | spdx:ODbL-1.0
  ofl-1.1 | SIL Open Font License 1.1 | spdx:OFL-1.1
  osl-3.0 | Open Software License 3.0 | spdx:OSL-3.0

copies: pass the licence and its use restrictions on
  bigcode-openrail-m | BigCode Open RAIL-M v1 | https://www.bigcode-project.org/docs/pages/bigcode-openrail
  bigscience-bloom-rail-1.0 | BigScience BLOOM RAIL 1.0 | hf:spaces/bigscience/license
  bigscience-openrail-m | BigScience OpenRAIL-M | https://bigscience.huggingface.co/blog/bigscience-openrail-m
  c-uda | Computational Use of Data Agreement | spdx:C-UDA-1.0
  creativeml-openrail-m | CreativeML OpenRAIL-M | hf:spaces/CompVis/stable-diffusion-license
  fair-ai-public-license-1.0-sd | Fair AI Public License 1.0-SD | https://freedevproject.org/faipl-1.0-sd/
  faipl-1.0-sd | Fair AI Public License 1.0-SD | https://freedevproject.org/faipl-1.0-sd/
  gemma | Gemma Terms of Use | https://ai.google.dev/gemma/terms
  grok2-community | Grok 2 Community License Agreement | hf:xai-org/grok-2/blob/main/LICENSE
  openrail | OpenRAIL license family | hf:blog/open_rail
  openrail++ | Open RAIL++-M License | hf:stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md

copies: pass the licence, its notice and its use restrictions on, large companies need another licence
  llama2 | Llama 2 Community License | hf:meta-llama/Llama-2-7b-chat-hf/blob/main/LICENSE.txt
  ltx-2-community-license-agreement | LTX-2 Community License Agreement | github:Lightricks/LTX-2/blob/main/LICENSE
  playground-v2-community | Playground v2 Community License | hf:playgroundai/playground-v2-1024px-aesthetic
  playground-v2dot5-community | Playground v2.5 Community License | hf:playgroundai/playground-v2.5-1024px-aesthetic
  stable-audio-community | Stability AI Community License | https://stability.ai/license
  stable-video-diffusion-community | Stability AI Community License | https://stability.ai/license
  stabilityai-ai-community | Stability AI Community License | https://stability.ai/license

copies: pass the licence and its notice on, name Llama, large companies need another licence
  llama3 | Llama 3 Community License | hf:meta-llama/Meta-Llama-3-8B/blob/main/LICENSE
  llama3.1 | Llama 3.1 Community License | hf:meta-llama/Meta-Llama-3.1-70B-Instruct/blob/main/LICENSE
  llama3.2 | Llama 3.2 Community License | hf:meta-llama/Llama-3.2-1B/blob/main/LICENSE.txt
  llama3.3 | Llama 3.3 Community License | hf:meta-llama/Llama-3.3-70B-Instruct/blob/main/LICENSE
  llama4 | Llama 4 Community License | hf:meta-llama/Llama-4-Scout-17B-16E-Instruct/blob/main/LICENSE

copies: pass the licence, its notice and its use policy on, filter outputs, large companies need another licence
  krea-2-community-license | Krea 2 Community License | github:krea-ai/krea-2/blob/main/docs/KREA-2-COMMUNITY-LICENSE

copies: non-commercial, pass the licence and its notice on
  circlestone-labs-non-commercial-license | CircleStone Labs Non-Commercial License | hf:circlestone-labs/Anima
  flux-1-dev-non-commercial-license | FLUX.1 [dev] Non-Commercial License | hf:black-forest-labs/FLUX.1-dev
  sai-nc-community | Stability AI Non-Commercial Research Community License | hf:stabilityai/sd-turbo
  stabilityai-nc-research-community | Stability AI Non-Commercial Research Community License
  stable-cascade-nc-community | Stability AI Non-Commercial Research Community License | hf:stabilityai/stable-cascade

copies: non-commercial, pass the licence and its notice on, filter or review outputs
  flux-dev-non-commercial-license | FLUX [dev] Non-Commercial License | hf:black-forest-labs/FLUX.2-dev
  flux-non-commercial-license | FLUX Non-Commercial License | hf:black-forest-labs/FLUX.2-klein-9B

copies: non-commercial research, pass the licence and its notice on
  apple-amlr | Apple Machine Learning Research Model License | hf:apple/deeplabv3-mobilevit-small/blob/main/LICENSE
  deepfloyd-if-license | DeepFloyd IF License Agreement | github:deep-floyd/IF/blob/HEAD/LICENSE-MODEL
  fair-noncommercial-research-license | FAIR Noncommercial Research v1 | hf:facebook/fair-noncommercial-research-license

no copies: no adaptations may be shared
  cc-by-nd-4.0 | Creative Commons Attribution NoDerivatives 4.0 | cc:licenses/by-nd/4.0
  cc-by-nc-nd-3.0 | Creative Commons Attribution NonCommercial NoDerivatives 3.0 | cc:licenses/by-nc-nd/3.0
  cc-by-nc-nd-4.0 | Creative Commons Attribution NonCommercial NoDerivatives 4.0 | cc:licenses/by-nc-nd/4.0

no copies: research only, no right to adapt
  intel-research | Intel Research Use License Agreement | hf:Intel/llava-gemma-7b/blob/main/LICENSE.md

no copies: does not say which Creative Commons licence
  cc | Creative Commons license family

no copies: not licensed in the EU, the UK and South Korea
  tencent-hunyuan-community | Tencent Hunyuan Community License | github:Tencent-Hunyuan/HunyuanVideo
"""


def _read(table):
    copies, note = False, ""
    for line in filter(None, table.splitlines()):
        if not line.startswith(" "):
            verdict, _, note = line.partition(":")
            copies, note = verdict == "copies", note.strip()
            continue
        identifier, name, *link = (part.strip() for part in line.split("|"))
        site, _, page = link[0].partition(":") if link else ("", "", "")
        address = _SITES[site].format(page) if link else None
        yield License(identifier, name, copies, address, note, identifier not in _NAMES_OF_OTHER)


LICENSES: dict[str, License] = {license.id: license for license in _read(_TABLE)}


def find_license(identifier: str | None) -> License | None:
    """The licence of that identifier, in any case; None where it is not known."""
    return LICENSES.get(identifier.strip().lower()) if identifier else None


_STATE = "state it in the recipe (`publish: {license: ...}`) and apply that again"


@dataclass(frozen=True)
class Licensing:
    """The licence that the card names, and those of the weights' sources."""

    id: str
    name: str
    link: str | None
    note: str
    sources: tuple  # (source, licence or None) each
    notes: tuple = ()  # what whoever publishes should know


def check_licenses(sources: Iterable, stated: str, base: Mapping, weights: Literal["copy", "thin"]) -> Licensing:
    """The Licensing of a publication.

    sources: those of its weights. stated: the recipe's `publish.license`. base: pipeline, license and license_link of
    the base as the artifact has them. weights: "copy" or "thin"; a thin publication copies none.
    Raises PublishError where a licence is unknown and not stated, forbids copies, or the sources' licences differ and
    the recipe does not say which holds.
    """
    sources = list(sources)
    is_stated = stated != "inherit"
    found = {source.name: source.license for source in sources}
    on_disk = all(source.base is None for source in sources if source.name == base["pipeline"])
    if not is_stated and on_disk and base.get("license"):
        found[base["pipeline"]] = base["license"]  # a base in a folder has its licence from its own card
    for source in sources:
        _check_source(source, found[source.name], is_stated, copied=weights == "copy" or source.rewritten)
    chosen = _stated(stated, weights) if is_stated else _inherited(found)
    known = find_license(chosen)
    link = base.get("license_link") if not is_stated else None
    differing = [f"{name} {license}" for name, license in found.items() if license and license != chosen]
    note = f"the recipe states the licence {chosen}; the cards of the weights' sources say: {', '.join(differing)}"
    return Licensing(
        id=known.id if known else chosen,
        name=known.name if known else chosen,
        link=link or (known.link if known else None),
        note=known.note if known else "",
        sources=tuple(found.items()),
        notes=(note,) if is_stated and differing else (),
    )


def _stated(stated, weights):
    if stated.strip().lower() in ("", "unknown", "other"):
        raise PublishError(f"the recipe states the licence as {stated!r}, which is none; {_STATE}")
    known = find_license(stated)
    if known and not known.copies and weights == "copy":
        raise PublishError(
            f"the licence that the recipe states, {stated}, forbids a copy of the weights in another repository "
            f"({known.note}); publish none with --weights thin"
        )
    return stated.strip()


def _inherited(found):
    differing = {name: license for name, license in found.items() if license}
    if len(set(differing.values())) > 1:
        listed = ", ".join(f"{name} {license}" for name, license in differing.items())
        raise PublishError(f"the weights are under different licences ({listed}); {_STATE}")
    if not differing:
        raise PublishError(f"the base's licence is unknown; {_STATE}")
    return next(iter(differing.values()))


def _check_source(source, license, is_stated, copied):
    known = find_license(license)
    if known is not None:
        if copied and not known.copies:
            instead = "" if source.rewritten else "; --weights thin publishes none, and loading fetches them from there"
            raise PublishError(
                f"the licence of {source.name}, {license}, forbids a copy of its weights in another repository "
                f"({known.note}){instead}"
            )
    elif is_stated:
        return
    elif license in (None, "", "unknown", "other"):
        raise PublishError(f"the licence of {source.name} is unknown: its card names none; {_STATE}")
    elif copied:
        raise PublishError(
            f"whether the licence of {source.name}, {license}, allows a copy of its weights in another repository is "
            f"not known to this tool: read it, and if it does, {_STATE}; or publish no weights with --weights thin"
        )

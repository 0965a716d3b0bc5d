"""The look of the report: colours for both schemes, layout, and a few lines of script."""

from __future__ import annotations

from consilience.report._svg import LEVELS

# One hue from faint to strong, even in lightness, so that it reads the same to every eye.
SEQUENCE = {
    "light": ((241, 245, 250), (198, 219, 239), (123, 179, 219), (52, 127, 188), (14, 79, 146), (8, 42, 92)),
    "dark": ((29, 38, 50), (31, 66, 105), (38, 104, 163), (76, 152, 209), (149, 204, 240), (232, 246, 255)),
}
"""The stops of a heat map's colours, in red, green and blue."""
SERIES = {
    "light": ("#0b6bcb", "#d1590a", "#12825d", "#8447b8", "#c02f74", "#98700a", "#2591b8", "#626b78"),
    "dark": ("#6ea8fe", "#ff9d57", "#4fc99a", "#c39bf0", "#f58ab8", "#e3bb4a", "#6fd0ee", "#a8b0bd"),
}
INK = {
    "light": "--page:#f5f6f8;--card:#fff;--ink:#161b22;--soft:#5a6472;--rule:#e2e6eb;--faint:#f0f2f5;"
    "--accent:#0b5cad;--lost:#d1590a;--won:#12825d",
    "dark": "--page:#0e1217;--card:#161b22;--ink:#e7ebf0;--soft:#98a3b1;--rule:#2b333e;--faint:#1e252e;"
    "--accent:#7ab2ff;--lost:#ff9d57;--won:#4fc99a",
}


def shade(scheme: str, level: int) -> tuple[int, int, int]:
    """Mix one of the LEVELS colours of the sequence of a scheme.

    >>> shade("light", 0)
    (241, 245, 250)
    """
    # Linear between the two stops around it.
    stops = SEQUENCE[scheme]
    at = level / (LEVELS - 1) * (len(stops) - 1)
    first = min(int(at), len(stops) - 2)
    pairs = zip(stops[first], stops[first + 1], strict=True)
    red, green, blue = (round(low + (high - low) * (at - first)) for low, high in pairs)
    return red, green, blue


def luminance(colour: tuple[int, int, int]) -> float:
    """Return the relative luminance of a colour (WCAG)."""
    shares = [value / 255 for value in colour]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def scheme(name: str) -> str:
    """Write the custom properties of one colour scheme."""
    parts = [INK[name], *(f"--s{i}:{colour}" for i, colour in enumerate(SERIES[name]))]
    for level in range(LEVELS):
        red, green, blue = shade(name, level)
        parts.append(f"--q{level}:#{red:02x}{green:02x}{blue:02x}")
        # Dark text has more contrast on a light shade, white text on a dark one.
        dark = luminance((red, green, blue)) > 0.19
        parts.append(f"--t{level}:{'#10151c' if dark else '#fff'}")
    return ";".join(parts)


# Lines end anywhere, because newlines are removed. Names are short, because every cell of a map has one.
LAYOUT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main,footer{max-width:1240px;margin:0 auto;padding:0 clamp(12px,3vw,32px)}
header{padding-top:clamp(24px,5vw,52px)}
.brand{margin:0 0 6px;color:var(--accent);font-weight:600;font-size:12px;letter-spacing:.09em;
text-transform:uppercase}
h1{margin:0;font-size:clamp(24px,4vw,34px);line-height:1.2;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{margin:44px 0 10px;font-size:20px;letter-spacing:-.01em;overflow-wrap:anywhere}
h3{margin:0;font-size:17px;overflow-wrap:anywhere}
nav{margin-top:24px}nav h2{font-size:13px;margin:0 0 6px;color:var(--soft);font-weight:600}nav ol{margin:0;
padding-left:20px}nav li{margin:2px 0}nav li>a:first-letter{text-transform:uppercase}nav span a{
margin-left:12px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
h4,figcaption{display:flex;justify-content:space-between;gap:12px;align-items:flex-start}
.save{flex:none;display:flex;gap:4px}.save button,a.save{font-size:11.5px;font-weight:500;padding:1px 8px;
border:1px solid var(--rule);border-radius:6px;color:var(--soft)}
.sheet .scroll{max-height:420px;overflow:auto}.sheet thead th{position:sticky;top:0;background:var(--card);
padding-top:4px;z-index:1}.sheet thead th:first-child{z-index:2}.sheet th,.sheet td{padding:7px 12px}
h4,figcaption{margin:0 0 12px;font-size:14px;font-weight:600;line-height:1.4}
section h2:first-letter,figcaption>span:first-letter,h4>span:first-letter,dt:first-letter{
text-transform:uppercase}
.lead{margin:8px 0 0;color:var(--soft)}
i{font-style:normal;font-weight:400;color:var(--soft)}
.lead i{opacity:.5;margin:0 4px}
small{display:block;font-size:12.5px;font-weight:400;color:var(--soft)}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.chips{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 16px;font-size:13.5px}.chips b{font-weight:400;
color:var(--soft)}
.card{margin:0;padding:18px 20px;background:var(--card);border:1px solid var(--rule);border-radius:10px;
min-width:0}
.scroll{overflow-x:auto}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px;
margin-top:16px;
align-items:start}
.stack{display:grid;gap:16px;min-width:0}
.wide{grid-column:1/-1}
.texts{grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:9px 14px;text-align:left;border-bottom:1px solid var(--rule);font-weight:400}
thead th{font-size:12.5px;color:var(--soft);padding-top:0}thead th:first-letter{text-transform:uppercase}
tbody tr:last-child>*{border-bottom:0}tbody tr:hover>*{background:var(--faint)}
th:first-child{position:sticky;left:0;background:var(--card);padding-left:4px;min-width:9em;
max-width:min(46vw,360px);
white-space:normal;overflow-wrap:break-word}
td:not(.r){white-space:normal;overflow-wrap:break-word;max-width:420px}
tbody th{font-weight:600}.r{text-align:right}
.score{position:relative}
.score[style]:before,.score[style]:after{content:"";position:absolute;left:14px;bottom:3px;height:3px;
border-radius:2px;
width:calc(100% - 28px);background:var(--rule)}
.score[style]:after{background:linear-gradient(90deg,var(--s0) var(--v),transparent 0)}
.best{font-weight:700}
.verdict{margin-top:28px}.verdict p{margin:6px 0;overflow-wrap:anywhere}.verdict h4+p{font-size:17px;
font-weight:600}
.flag{color:var(--lost);font-weight:600}
.result{margin:0 0 16px;padding:0 clamp(12px,2vw,24px);border:1px solid var(--rule);border-radius:14px}
.result[open]{padding-bottom:clamp(12px,2vw,24px)}
summary{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;padding:14px 0;cursor:pointer;
list-style:none}
summary::-webkit-details-marker{display:none}
summary:before{content:"";width:7px;height:7px;border:solid var(--soft);border-width:0 2px 2px 0;
transform:rotate(-45deg) translate(-2px,0)}
[open]>summary:before{transform:rotate(45deg) translate(-3px,0)}
summary span{color:var(--soft);font-size:13.5px}summary strong{margin-left:auto;
font-variant-numeric:tabular-nums;
font-size:17px}
dl{margin:0}dd{margin:0}dt{color:var(--soft);font-size:12.5px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:1px;background:var(--card);
border:1px solid var(--rule);border-radius:10px;overflow:hidden}
.tiles div{background:var(--card);padding:12px 16px;box-shadow:0 0 0 1px var(--rule)}
.tiles dd{font-size:18px;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}.tiles i{
font-size:14px}
.facts div{display:flex;justify-content:space-between;gap:16px;padding:4px 0;
border-bottom:1px solid var(--rule)}
.facts div:last-child{border:0}.facts dd{text-align:right;overflow-wrap:anywhere;font-size:13px}
pre,textarea{margin:0;font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;tab-size:14}
pre{max-height:300px;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere}
textarea{display:block;width:100%;color:inherit;background:var(--faint);border:1px solid var(--rule);
border-radius:6px;
padding:10px;resize:vertical}
.copy h4{display:flex;justify-content:space-between;align-items:center}
button{font:inherit;font-size:13px;font-weight:500;color:var(--accent);background:none;
border:1px solid var(--rule);
border-radius:6px;padding:3px 12px;cursor:pointer}
button:hover{background:var(--faint)}
footer{padding-top:28px;padding-bottom:48px;color:var(--soft);font-size:13px}
svg{display:block;width:100%;height:auto;margin:0 auto;font-size:12px;fill:var(--ink);
font-variant-numeric:tabular-nums}
svg .m{fill:var(--soft)}svg .n{font-weight:600}svg .v{font-size:11px}
svg path{fill:none}.g{stroke:var(--rule)}.a{stroke:var(--soft);stroke-opacity:.6}
.l{stroke-width:1.4;stroke-linejoin:round;stroke-linecap:round}.l:hover{stroke-width:3}
.sx{stroke:var(--soft);stroke-opacity:.38;stroke-width:1}.sx:hover{stroke-opacity:1}
svg .h{fill:transparent;stroke:none}circle.h:hover{fill:var(--ink);fill-opacity:.18}
svg .pt{fill:currentColor;stroke-width:1.4}
svg .bs{stroke:none;fill-opacity:.14}svg .bound{stroke:var(--ink);stroke-width:1.6;stroke-linecap:round}
svg .end{font-weight:600}svg .ink{fill:var(--ink)}svg .at{fill:var(--s0)}
svg .ring{fill:var(--card);stroke:var(--s0);stroke-width:2}svg .whisker{stroke:var(--ink);stroke-width:1.6}
svg .strong{stroke-width:2.2}svg .mean{stroke:var(--ink);stroke-width:3}svg .dot{fill:var(--ink)}
svg .band{fill:var(--ink);
fill-opacity:.13}
.trail{stroke-width:1.4;stroke-opacity:.5}.trail:hover{stroke-opacity:1}.err{stroke-width:1.6}
svg .p{stroke:var(--card);stroke-width:1.2}
svg .lost{fill:var(--lost)}svg .won{fill:var(--won)}
svg .learn{fill:none;stroke:var(--lost);stroke-width:1.8}
svg .qn{fill:var(--rule)}svg .qn text{fill:var(--soft)}
@media(max-width:560px){.card{padding:14px 12px}th,td{padding:8px 10px}.tiles{
grid-template-columns:1fr 1fr}.tiles div{
padding:10px 12px}}
@media print{body{background:none;font-size:12px}.card,.result,.tiles,figure{break-inside:avoid}.result{
break-inside:auto}pre{
max-height:none}.copy,.save,nav{display:none!important}.sheet .scroll{max-height:none}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}.scroll{overflow:visible}svg{
min-width:0!important}}
"""

# A chart names its shades and colours by class; the scheme of the page says what they are.
SHADES = "".join(
    f"svg .q{level}{{fill:var(--q{level})}}svg .q{level} text{{fill:var(--t{level})}}"
    for level in range(LEVELS)
)
COLOURS = "".join(f".s{i}{{stroke:var(--s{i})}}svg .c{i}{{fill:var(--s{i})}}" for i in range(8))
STYLE = (
    f":root{{color-scheme:light dark;{scheme('light')}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{scheme('dark')}}}}}"
    f"{LAYOUT.replace(chr(10), '')}{SHADES}{COLOURS}"
)

# A link of the table opens the details that it leads to; a page that is printed shows all of them. A chart is
# saved with the page's style in it, as SVG or drawn on a canvas; cells of large maps look their value up.
SCRIPT = """
document.addEventListener("click",e=>{const b=e.target.closest(".copy button");if(!b)return;
const t=b.closest(".copy").querySelector("textarea");t.select();
const done=()=>{b.textContent="Copied";setTimeout(()=>{b.textContent="Copy"},1500)};
if(navigator.clipboard)navigator.clipboard.writeText(t.value).then(done,()=>{
document.execCommand("copy");done()});
else{document.execCommand("copy");done()}});
const save=(name,url)=>{const a=document.createElement("a");a.download=name;a.href=url;
document.body.append(a);a.click();a.remove()};
const alone=f=>{const c=f.querySelector("svg").cloneNode(true),b=c.viewBox.baseVal;
c.setAttribute("width",b.width*1.5);c.setAttribute("height",b.height*1.5);c.removeAttribute("style");
c.querySelectorAll("[data-cells]").forEach(r=>r.remove());
const s=document.createElementNS(c.namespaceURI,"style");
s.textContent=document.querySelector("style").textContent+"svg{font-family:system-ui,sans-serif}";
const r=document.createElementNS(c.namespaceURI,"rect");r.setAttribute("width","100%");
r.setAttribute("height","100%");r.setAttribute("style","fill:var(--card)");c.prepend(s,r);
return["data:image/svg+xml;charset=utf-8,"+encodeURIComponent(new XMLSerializer().serializeToString(c)),
b.width*3,b.height*3]};
document.addEventListener("click",e=>{const b=e.target.closest("[data-save]");if(!b)return;
const f=b.closest("figure"),name=f.dataset.name+"."+b.dataset.save,[url,w,h]=alone(f);
if(b.dataset.save==="svg")return save(name,url);
const i=new Image();i.onload=()=>{const c=document.createElement("canvas");c.width=w;c.height=h;
c.getContext("2d").drawImage(i,0,0,w,h);save(name,c.toDataURL("image/png"))};i.src=url});
document.addEventListener("mousemove",e=>{const r=e.target;if(!r.dataset||!r.dataset.cells)return;
const d=r.d||(r.d=JSON.parse(r.dataset.cells)),q=r.getBoundingClientRect(),
i=Math.min(d.rows.length-1,Math.floor((e.clientY-q.top)/q.height*d.rows.length)),
j=Math.min(d.names.length-1,Math.floor((e.clientX-q.left)/q.width*d.names.length));
if(i>=0&&j>=0)r.firstChild.textContent=d.rows[i]+", "+d.names[j]+": "+d.values[i][j]});
const unfold=()=>{const d=location.hash&&document.getElementById(location.hash.slice(1));
if(d&&d.tagName==="DETAILS"){d.open=true;d.scrollIntoView()}};
addEventListener("hashchange",unfold);unfold();
addEventListener("beforeprint",()=>document.querySelectorAll("details").forEach(d=>{d.open=true}));
"""

//! The page of a run: one file, no script, nothing loaded from elsewhere.

use std::fmt::Write;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::metric::times;
use crate::report::charts::{bars, lines, percentiles};
use crate::report::findings::findings;
use crate::report::group::{Group, drawn, groups};
use crate::report::palette::{class, style};
use crate::report::reference;
use crate::report::targets::{Outcome, Verdict, outcomes};
use crate::results::{Cell, Metric, Results};
use crate::stats::coverage_bound;

/// Suites in the order of the page, with a title and what to know of them.
const SUITES: [(&str, &str, &str); 5] = [
    (
        "block",
        "Block",
        "One guest, one disk. Every system serves the same bench guest, which counts and times its requests itself.",
    ),
    ("network", "Network", "Two guests in one network, or a guest and the host."),
    (
        "jitter",
        "What computing guests lose",
        "The guest computes on its vCPU while its disk is read at a fixed rate, and measures how much of its CPU time it did not \
         get and its longest stand-still.",
    ),
    ("scale", "Many VMs on one back-end", "Every VM has a disk of its own; all are loaded at once."),
    (
        "start-up",
        "Start-up, memory, idling",
        "From the start of the hypervisor's process; memory is what it has beyond guest RAM.",
    ),
];

/// The whole page.
pub(crate) fn page(results: &Results) -> String {
    let title = "What moving I/O out of the hypervisor costs and buys";
    let suites: Vec<_> =
        SUITES.iter().filter(|(suite, ..)| results.cells.iter().any(|c| c.suite == *suite)).collect();
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(include_str!("page.css"))) (PreEscaped(style(results))) }
            }
            body {
                header {
                    h1 { (title) }
                    p.meta { (when_and_where(results)) }
                    nav {
                        a href="#targets" { "Targets" }
                        @for (suite, title, _) in &suites { a href=(format!("#{suite}")) { (title) } }
                        a href="#machine" { "Machine, method, how to repeat" }
                    }
                }
                main {
                    (headline(results))
                    (systems(results))
                    (targets(&outcomes(results)))
                    @for (suite, title, about) in &suites {
                        section id=(suite) {
                            h2 { (title) }
                            p { (about) }
                            @for group in groups(results, suite) { (group_section(results, &group)) }
                        }
                    }
                    (machine(results))
                }
            }
        }
    }
    .into_string()
}

fn when_and_where(results: &Results) -> String {
    let machine = &results.machine;
    let date = results.started.split('T').next().unwrap_or_default();
    format!(
        "Outboard {}, measured {date} on {}, {} CPUs, {} RAM, Linux {} with {}; {} rounds in {}.",
        results.version,
        machine.cpu,
        machine.cpus,
        Metric::MemoryBytes.format(machine.memory_bytes as f64),
        machine.kernel,
        machine.kvm,
        results.settings.rounds,
        duration(results.seconds)
    )
}

/// "1 h 12 min", "3 min", "40 s".
fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        0 | 1 => format!("{seconds:.0} s"),
        2..60 => format!("{minutes} min"),
        _ => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

fn headline(results: &Results) -> Markup {
    let findings = findings(results);
    html! {
        section {
            @if !findings.is_empty() {
                dl.findings {
                    @for finding in &findings {
                        dt { (finding.figure) }
                        dd { (finding.text) }
                    }
                }
            }
            p.note { (how_to_read(results)) }
        }
    }
}

fn how_to_read(results: &Results) -> String {
    let rounds = results.settings.rounds as usize;
    let mut text = format!(
        "Figures are medians of {rounds} rounds. In each round all systems ran in turns, and ratios (here to {}) pair what was \
         measured in the same round. Brackets and whiskers are 95 % bootstrap intervals of the median.",
        reference(results)
    );
    if rounds < 6 {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            " With {rounds} rounds such an interval is little more than the range of what was seen and holds the true median in at \
             most {:.0} % of runs: read it as the scatter of this run, not as a proof.",
            100.0 * coverage_bound(rounds.max(1))
        );
    }
    text
}

fn systems(results: &Results) -> Markup {
    html! {
        section {
            h3 { "Systems" }
            div.scroll { table {
                tbody { @for system in &results.systems {
                    tr {
                        td.nowrap { span class=(format!("swatch {}", class(results, &system.name))) {} (system.name) }
                        td { (system.description) }
                        td.nowrap { (system.version) }
                    }
                } }
            } }
        }
    }
}

fn targets(outcomes: &[Outcome]) -> Markup {
    let count = |verdicts: &[Verdict]| outcomes.iter().filter(|o| verdicts.contains(&o.verdict)).count();
    html! {
        section id="targets" {
            h2 { "Targets" }
            p {
                (count(&[Verdict::Met, Verdict::MetBarely])) " met, "
                (count(&[Verdict::Missed, Verdict::MissedBarely])) " missed, "
                (count(&[Verdict::NotMeasured])) " not measured in this run. A target is judged by the median; "
                "“unclear” means that the interval reaches to the other side of the limit. Of several workloads the worst decides."
            }
            div.scroll { table {
                thead { tr { th { "Target" } th { "Condition" } th { "Measured" } th { "Workload" } th { "Verdict" } } }
                tbody { @for outcome in outcomes {
                    @let (class, text) = verdict(outcome.verdict);
                    tr {
                        td { (outcome.name) }
                        td { (outcome.condition) }
                        td { (outcome.measured) }
                        td { code { (outcome.cell) } }
                        td class=(format!("verdict {class}")) { (text) }
                    }
                } }
            } }
        }
    }
}

fn verdict(verdict: Verdict) -> (&'static str, &'static str) {
    match verdict {
        Verdict::Met => ("met", "✓ met"),
        Verdict::MetBarely => ("met", "✓ met, unclear"),
        Verdict::Missed => ("missed", "✗ missed"),
        Verdict::MissedBarely => ("missed", "✗ missed, unclear"),
        Verdict::NotMeasured => ("open", "– not measured"),
    }
}

fn group_section(results: &Results, group: &Group) -> Markup {
    let reference = reference(results);
    html! {
        h3 { (group.title) }
        div.grid {
            @if group.is_lines {
                @let points: Vec<(f64, &Cell)> = group.cells.iter().filter_map(|(n, c)| Some((n.parse().ok()?, *c))).collect();
                @for &metric in &group.metrics {
                    @if let Some(svg) = lines(results, &points, metric, group.axis) {
                        figure { h4 { (metric.label()) " " span { "(" (metric.better().label()) ")" } } (svg) }
                    }
                }
            } @else {
                @for (value, cell) in &group.cells {
                    @for metric in drawn(cell) {
                        @if let Some(svg) = bars(results, cell, metric, reference) {
                            figure { h4 { (group.point(value)) span { (metric.label()) } } (svg) }
                        }
                    }
                }
                @for (value, cell) in group.with_latency() {
                    @if let Some(svg) = percentiles(results, cell) {
                        figure { h4 { (group.point(value)) span { "latency by percentile, as the guest saw it" } } (svg) }
                    }
                }
            }
        }
        details open[group.is_table] {
            summary { "All figures: medians, middle half, and ratio to " (reference) " with its interval" }
            (figures(results, group, reference))
        }
    }
}

/// Everything that was measured in a group, as a table.
fn figures(results: &Results, group: &Group, reference: &str) -> Markup {
    let Some(metrics) = group.cells.first().map(|(_, c)| &c.headline) else { return html! {} };
    // In all cells of a group the metrics are the same, if in another order.
    let first = metrics.first().copied();
    html! {
        div.scroll { table {
            thead { tr {
                th { "Workload" } th { "System" }
                @for metric in metrics {
                    th.n { (metric.short()) }
                    @if Some(*metric) == first { th.n { "middle half" } th.n { "to " (reference) } }
                }
            } }
            tbody { @for (_, cell) in &group.cells {
                @for (i, series) in cell.systems.iter().enumerate() {
                    tr class=(if i == 0 { "first" } else { "" }) {
                        td { @if i == 0 { code { (cell.id) } } }
                        td.nowrap { span class=(format!("swatch {}", class(results, &series.system))) {} (series.system) }
                        @if series.samples.is_empty() {
                            td colspan=(metrics.len() + 2) { small { "not measured" @if !series.note.is_empty() { ": " (series.note) } } }
                        } @else {
                            @for &metric in metrics {
                                (figure(cell, &series.system, metric, reference, Some(metric) == first))
                            }
                        }
                    }
                }
            } }
        } }
    }
}

fn figure(cell: &Cell, system: &str, metric: Metric, reference: &str, in_full: bool) -> Markup {
    let summary = cell.summary(system, metric);
    html! {
        td.n {
            @if let Some(s) = &summary { span.best[cell.best(metric) == Some(s.median)] { (metric.format(s.median)) } }
        }
        @if in_full {
            td.n { @if let Some(s) = &summary { small { (metric.format(s.p25)) " to " (metric.format(s.p75)) } } }
            td.n {
                @if system == reference { small { "reference" } }
                @else if let Some(r) = cell.ratio(system, reference, metric) {
                    (times(r.value)) " " small { "(" (times(r.low)) " to " (times(r.high)) ")" }
                }
            }
        }
    }
}

fn machine(results: &Results) -> Markup {
    let (machine, settings) = (&results.machine, &results.settings);
    let rows = [
        ("Processor", format!("{}, {} online", machine.cpu, machine.cpus)),
        ("Memory", Metric::MemoryBytes.format(machine.memory_bytes as f64)),
        ("Kernel", machine.kernel.clone()),
        ("KVM", machine.kvm.clone()),
        ("File system of the test files", machine.file_system.clone()),
        ("Began", results.started.clone()),
        ("Took", duration(results.seconds)),
        ("Rounds", settings.rounds.to_string()),
        ("Each sample", format!("{} s to warm up, {} s measured", settings.warmup_s, settings.measure_s)),
        (
            "Threads",
            if settings.pinned {
                "vCPU and back-end pinned to a processor each"
            } else {
                "placed by the kernel"
            }
            .to_owned(),
        ),
    ];
    html! {
        section id="machine" {
            h2 { "Machine, method, how to repeat" }
            div.scroll { table { tbody { @for (name, value) in &rows { tr { td.nowrap { (name) } td { (value) } } } } } }
            p { "To repeat it, as root in a checkout of Outboard " (results.version) ":" }
            pre { code { (settings.command) } }
            h3 { "What limits these figures" }
            ul {
                @for remark in &machine.remarks { li { (remark) } }
                li { "Systems are compared within this run only. Another run, on this machine or another, has other conditions in common; " code { "offload-bench compare" } " treats it so." }
                li { "An interval tells how much rounds of this run differ. It knows nothing of what was the same in all of them: this machine, this kernel, these versions." }
                li { "The guest is a bench guest and no Linux: it measures the path of a request, not an application." }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    /// Elements that have no end.
    const VOID: [&str; 2] = ["meta", "!DOCTYPE"];

    /// # Panics
    /// If an element does not end where it should.
    fn assert_balanced(page: &str) -> usize {
        let (mut open, mut elements) = (Vec::new(), 0);
        let mut rest = page;
        while let Some(start) = rest.find('<') {
            let end = start + rest[start..].find('>').expect("a tag without end");
            let tag = &rest[start + 1..end];
            rest = &rest[end + 1..];
            let name = tag.trim_start_matches('/').split_ascii_whitespace().next().unwrap();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name), "before {}", &rest[..rest.len().min(80)]);
            } else if !VOID.contains(&name) {
                elements += 1;
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
        elements
    }

    #[test]
    fn the_page_is_whole_and_loads_nothing() {
        let page = page(&fixture::results(5));
        assert!(assert_balanced(&page) > 1000);
        for foreign in ["http:", "https:", "<script", "<link", "<img", "@import", "url(", "NaN", "inf,"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        for (suite, ..) in SUITES {
            assert!(page.contains(&format!("id=\"{suite}\"")), "{suite}");
        }
        assert!(page.contains("94 % of runs"), "5 rounds must be said to be few");
        // To look at it: BENCH_PAGE=/tmp/page.html.
        if let Some(path) = std::env::var_os("BENCH_PAGE") {
            std::fs::write(path, page).unwrap();
        }
    }

    #[test]
    fn more_rounds_need_no_excuse() {
        assert!(!page(&fixture::results(9)).contains("not as a proof"));
    }

    #[test]
    fn names_cannot_become_markup() {
        let evil = "<b onclick='x'>\"&";
        let mut results = fixture::results(3);
        results.settings.command = evil.to_owned();
        results.machine.cpu = evil.to_owned();
        results.systems[1].name = evil.to_owned();
        results.systems[2].description = evil.to_owned();
        for cell in &mut results.cells {
            cell.id.push_str(evil);
            cell.parameters.insert(evil.to_owned(), evil.to_owned());
            for series in cell.systems.iter_mut().filter(|s| s.system == "card-adaptive") {
                series.system = evil.to_owned();
            }
        }
        results.cells[0].systems[3].samples.clear();
        results.cells[0].systems[3].note = evil.to_owned();
        let page = page(&results);
        assert!(!page.contains("<b ") && page.contains("&lt;b onclick='x'&gt;&quot;&amp;"));
        assert_balanced(&page);
    }

    #[test]
    fn odd_results_make_a_page_too() {
        let mut results = fixture::results(1);
        assert_balanced(&page(&results));
        for cell in &mut results.cells {
            for series in &mut cell.systems {
                for sample in &mut series.samples {
                    sample.values.values_mut().for_each(|v| *v = 0.0);
                    sample.latency = vec![(0, 0), (u64::MAX, u64::MAX)];
                }
            }
        }
        let zero = page(&results);
        assert!(!zero.contains("NaN"));
        assert_balanced(&zero);
        for cell in &mut results.cells {
            cell.parameters.clear();
            cell.headline.clear();
        }
        assert_balanced(&page(&results));
        results.cells.clear();
        results.systems.clear();
        assert_balanced(&page(&results));
    }

    #[test]
    fn durations() {
        assert_eq!([4_312.0, 200.0, 40.0].map(duration), ["1 h 12 min", "3 min", "40 s"]);
    }
}

//! Charts, as SVG that is part of the page: bars, lines over a number, percentiles of latency.

use std::f64::consts::LOG10_2;

use maud::{Markup, html};

use crate::metric::times;
use crate::report::palette::class;
use crate::results::{Cell, Metric, Results};
use crate::stats;

/// Width of every chart, in its own units (a pixel at the size of a wide screen).
const WIDTH: f64 = 520.0;
const FONT: f64 = 12.0;

/// A coordinate, with a tenth of a pixel.
fn at(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

/// Horizontal bars from zero: the median of each system with its interval, its figure, and its ratio to the reference.
pub(crate) fn bars(results: &Results, cell: &Cell, metric: Metric, reference: &str) -> Option<Markup> {
    const NAMES: f64 = 108.0;
    const FIGURES: f64 = 136.0;
    const ROW: f64 = 22.0;
    const BAR: f64 = 14.0;
    let rows: Vec<_> =
        cell.systems.iter().filter_map(|s| Some((s, stats::median_interval(&s.values(metric))?))).collect();
    let most = rows.iter().map(|(_, e)| e.high).fold(0.0, f64::max);
    if rows.is_empty() {
        return None;
    }
    let axis = Axis::from_zero(most, metric, 4);
    let plot = WIDTH - NAMES - FIGURES;
    let x = |value: f64| NAMES + plot * value / axis.end;
    let bottom = ROW * rows.len() as f64 + 4.0;
    let height = bottom + 34.0;
    let best = cell.best(metric);
    Some(html! {
        svg viewBox=(format!("0 0 {WIDTH} {}", at(height))) role="img" aria-label=(format!("{}: {}", cell.id, metric.label())) {
            @for &tick in &axis.ticks {
                line.grid x1=(at(x(tick))) x2=(at(x(tick))) y1="0" y2=(at(bottom)) {}
                text.tick x=(at(x(tick))) y=(at(bottom + 14.0)) text-anchor="middle" { (axis_text(metric, tick)) }
            }
            @for (i, (series, median)) in rows.iter().enumerate() {
                @let middle = ROW * i as f64 + ROW / 2.0 + 2.0;
                @let ratio = cell.ratio(&series.system, reference, metric);
                g class=(class(results, &series.system)) {
                    title {
                        (series.system) ": " (metric.format(median.value)) ", 95 % interval "
                        (metric.format(median.low)) " to " (metric.format(median.high))
                        @if let Some(r) = ratio { "; " (crate::report::table::ratio_text(&r)) " of " (reference) }
                    }
                    text.name x=(at(NAMES - 8.0)) y=(at(middle + 4.0)) text-anchor="end" { (series.system) }
                    rect.bar x=(at(NAMES)) y=(at(middle - BAR / 2.0)) width=(at((x(median.value) - NAMES).max(0.0))) height=(at(BAR)) {}
                    (whisker(x(median.low), x(median.high), middle))
                    text.figure.best[best == Some(median.value)] x=(at(WIDTH - 62.0)) y=(at(middle + 4.0)) text-anchor="end" {
                        (metric.format(median.value))
                    }
                    @if series.system == reference {
                        text.ratio x=(WIDTH) y=(at(middle + 4.0)) text-anchor="end" { "reference" }
                    } @else if let Some(r) = ratio {
                        text.ratio.clear[r.excludes(1.0)] x=(WIDTH) y=(at(middle + 4.0)) text-anchor="end" { (times(r.value)) }
                    }
                }
            }
            line.axis x1=(at(NAMES)) x2=(at(NAMES)) y1="0" y2=(at(bottom)) {}
            text.title x=(at(NAMES + plot / 2.0)) y=(at(bottom + 29.0)) text-anchor="middle" { (axis_title(metric)) }
        }
    })
}

/// The interval of a bar, drawn so that it shows on the bar and beside it.
fn whisker(low: f64, high: f64, y: f64) -> Markup {
    let path = |low: f64, high: f64| {
        format!(
            "M{l} {t}V{b}M{l} {y}H{h}M{h} {t}V{b}",
            l = at(low),
            h = at(high),
            t = at(y - 3.5),
            b = at(y + 3.5),
            y = at(y)
        )
    };
    html! {
        path.halo d=(path(low, high)) {}
        path.whisker d=(path(low, high)) {}
    }
}

/// A line per system over a number (of VMs), from zero, labelled at its end.
pub(crate) fn lines(
    results: &Results,
    points: &[(f64, &Cell)],
    metric: Metric,
    label: &str,
) -> Option<Markup> {
    const LEFT: f64 = 62.0;
    const RIGHT: f64 = 112.0;
    const BOTTOM: f64 = 210.0;
    const TOP: f64 = 8.0;
    let mut series = Vec::new();
    for system in &results.systems {
        let line: Vec<_> = points
            .iter()
            .filter_map(|(n, cell)| {
                let values = cell.series(&system.name)?.values(metric);
                Some((*n, stats::median_interval(&values)?))
            })
            .collect();
        if !line.is_empty() {
            series.push((system.name.as_str(), line));
        }
    }
    let all = || series.iter().flat_map(|(_, line)| line);
    let most = all().map(|(_, e)| e.high).fold(0.0, f64::max);
    let (first, last) = (points.first()?.0, points.last()?.0);
    if series.is_empty() || first <= 0.0 {
        return None;
    }
    let axis = Axis::from_zero(most, metric, 5);
    let span = (last / first).log2().max(1e-9);
    let x = |n: f64| LEFT + (WIDTH - LEFT - RIGHT) * ((n / first).log2() / span);
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * value / axis.end;
    let ends: Vec<f64> = series.iter().map(|(_, l)| l.last().map_or(BOTTOM, |(_, e)| y(e.value))).collect();
    let labels = spread(&ends, FONT + 2.0, TOP, BOTTOM);
    Some(html! {
        svg viewBox=(format!("0 0 {WIDTH} {}", at(BOTTOM + 36.0))) role="img" aria-label=(metric.label()) {
            @for &tick in &axis.ticks {
                line.grid x1=(at(LEFT)) x2=(at(WIDTH - RIGHT)) y1=(at(y(tick))) y2=(at(y(tick))) {}
                text.tick x=(at(LEFT - 6.0)) y=(at(y(tick) + 4.0)) text-anchor="end" { (axis_text(metric, tick)) }
            }
            @for (n, _) in points {
                text.tick x=(at(x(*n))) y=(at(BOTTOM + 15.0)) text-anchor="middle" { (n) }
            }
            @for (((system, line), end), label) in series.iter().zip(&ends).zip(&labels) {
                g class=(class(results, system)) {
                    polyline.line points=(path(line.iter().map(|(n, e)| (x(*n), y(e.value))))) {}
                    @for (n, e) in line {
                        path.range d=(format!("M{x} {}V{}", at(y(e.low)), at(y(e.high)), x = at(x(*n)))) {}
                        circle.dot cx=(at(x(*n))) cy=(at(y(e.value))) r="3.2" {
                            title { (system) ", " (n) ": " (metric.format(e.value)) " (" (metric.format(e.low)) " to " (metric.format(e.high)) ")" }
                        }
                    }
                    (end_label(system, x(line.last().map_or(last, |(n, _)| *n)), *end, WIDTH - RIGHT, *label))
                }
            }
            line.axis x1=(at(LEFT)) x2=(at(WIDTH - RIGHT)) y1=(at(BOTTOM)) y2=(at(BOTTOM)) {}
            text.title x=(at((LEFT + WIDTH - RIGHT) / 2.0)) y=(at(BOTTOM + 31.0)) text-anchor="middle" { (label) }
        }
    })
}

/// Latency by percentile, both logarithmic: the tail is as easy to read as the middle.
pub(crate) fn percentiles(results: &Results, cell: &Cell) -> Option<Markup> {
    const LEFT: f64 = 62.0;
    const RIGHT: f64 = 112.0;
    const BOTTOM: f64 = 230.0;
    const TOP: f64 = 8.0;
    /// Percentiles, by the number of nines.
    const TICKS: [(f64, &str); 6] =
        [(0.0, "0"), (LOG10_2, "50"), (1.0, "90"), (2.0, "99"), (3.0, "99.9"), (4.0, "99.99")];
    let series: Vec<(&str, Vec<(f64, f64)>)> = cell
        .systems
        .iter()
        .map(|s| (s.system.as_str(), tail(&s.latency(), TICKS[5].0)))
        .filter(|(_, line)| line.len() > 1)
        .collect();
    let all = || series.iter().flat_map(|(_, line)| line.iter().map(|p| p.1));
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    if series.is_empty() || least <= 0.0 {
        return None;
    }
    // Whole steps of 1, 2, 5 around what is there.
    let ticks = log_ticks(least, most);
    let (low, high) = (ticks[0].log10(), ticks[ticks.len() - 1].log10());
    let x = |nines: f64| LEFT + (WIDTH - LEFT - RIGHT) * nines / TICKS[5].0;
    let y = |ns: f64| BOTTOM - (BOTTOM - TOP) * (ns.log10() - low) / (high - low);
    let ends: Vec<f64> = series.iter().map(|(_, l)| l.last().map_or(BOTTOM, |p| y(p.1))).collect();
    let labels = spread(&ends, FONT + 2.0, TOP, BOTTOM);
    Some(html! {
        svg viewBox=(format!("0 0 {WIDTH} {}", at(BOTTOM + 36.0))) role="img" aria-label=(format!("{}: latency by percentile", cell.id)) {
            @for &tick in &ticks {
                line.grid x1=(at(LEFT)) x2=(at(WIDTH - RIGHT)) y1=(at(y(tick))) y2=(at(y(tick))) {}
                text.tick x=(at(LEFT - 6.0)) y=(at(y(tick) + 4.0)) text-anchor="end" { (axis_text(Metric::P50Ns, tick)) }
            }
            @for (nines, name) in TICKS {
                line.grid x1=(at(x(nines))) x2=(at(x(nines))) y1=(at(TOP)) y2=(at(BOTTOM)) {}
                text.tick x=(at(x(nines))) y=(at(BOTTOM + 15.0)) text-anchor="middle" { (name) }
            }
            @for (((system, line), end), label) in series.iter().zip(&ends).zip(&labels) {
                g class=(class(results, system)) {
                    polyline.line points=(path(line.iter().map(|(nines, ns)| (x(*nines), y(*ns))))) { title { (system) } }
                    (end_label(system, x(line.last().map_or(0.0, |p| p.0)), *end, WIDTH - RIGHT, *label))
                }
            }
            line.axis x1=(at(LEFT)) x2=(at(WIDTH - RIGHT)) y1=(at(BOTTOM)) y2=(at(BOTTOM)) {}
            text.title x=(at((LEFT + WIDTH - RIGHT) / 2.0)) y=(at(BOTTOM + 31.0)) text-anchor="middle" { "percentile of requests; latency, logarithmic" }
        }
    })
}

/// A name beside the end of its line, with a leader to it if it had to move.
fn end_label(system: &str, x: f64, y: f64, edge: f64, label: f64) -> Markup {
    html! {
        path.leader d=(format!("M{} {}L{} {}", at(x + 4.0), at(y), at(edge + 14.0), at(label))) {}
        text.name x=(at(edge + 17.0)) y=(at(label + 4.0)) { (system) }
    }
}

fn path(points: impl Iterator<Item = (f64, f64)>) -> String {
    points.map(|(x, y)| format!("{},{}", at(x), at(y))).collect::<Vec<_>>().join(" ")
}

/// (nines, nanoseconds) of a distribution, up to as many nines as there are ten requests beyond.
fn tail(classes: &[(u64, u64)], most_nines: f64) -> Vec<(f64, f64)> {
    let total: f64 = classes.iter().map(|c| c.1 as f64).sum();
    let mut beyond = total;
    let mut line = Vec::new();
    for &(bound, requests) in classes {
        let nines = (total / beyond).log10();
        if beyond < 10.0 || nines > most_nines {
            break;
        }
        line.push((nines, bound as f64));
        beyond -= requests as f64;
    }
    // To the edge, where the next class begins.
    if let (Some(&(_, ns)), true) = (line.last(), beyond >= 10.0 && !line.is_empty()) {
        line.push(((total / beyond).log10().min(most_nines), ns));
    }
    line
}

/// Positions for labels that want to be at `wanted`, at least `gap` apart and within the bounds.
fn spread(wanted: &[f64], gap: f64, top: f64, bottom: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|&a, &b| wanted[a].total_cmp(&wanted[b]));
    let mut placed = wanted.to_vec();
    let mut free = top;
    for &i in &order {
        placed[i] = placed[i].max(free);
        free = placed[i] + gap;
    }
    let mut limit = bottom;
    for &i in order.iter().rev() {
        placed[i] = placed[i].min(limit);
        limit = placed[i] - gap;
    }
    placed
}

struct Axis {
    ticks: Vec<f64>,
    end: f64,
}

impl Axis {
    /// From zero to a little beyond `most`, with about so many steps of 1, 2 or 5.
    fn from_zero(most: f64, metric: Metric, steps: u32) -> Self {
        if most <= 0.0 {
            // Nothing to see: an axis with its zero only.
            return Self { ticks: vec![0.0], end: 1.0 };
        }
        let mut unit = 1.0;
        while metric.is_binary() && most / unit >= 1024.0 {
            unit *= 1024.0;
        }
        let rough = most / unit / f64::from(steps);
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].into_iter().find(|s| s * power >= rough).unwrap_or(10.0) * power * unit;
        let count = (most / step * 0.999_999).ceil().max(1.0);
        let ticks = (0..=count as u32).map(|i| f64::from(i) * step).collect();
        Self { ticks, end: count * step }
    }
}

/// Steps of 1, 2, 5 that hold `least` and `most`; of powers of ten if they are far apart.
fn log_ticks(least: f64, most: f64) -> Vec<f64> {
    let decades = (least.log10().floor() as i32)..=(most.log10().ceil() as i32);
    let far = (most / least).log10() > 2.5;
    let steps: &[f64] = if far { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all: Vec<f64> = decades.flat_map(|d| steps.iter().map(move |s| s * 10f64.powi(d))).collect();
    let first = all.iter().rposition(|&t| t <= least).unwrap_or(0);
    let last = all.iter().position(|&t| t >= most && t > all[first]).unwrap_or(all.len() - 1);
    all[first..=last].to_vec()
}

/// "500 k", "1 M", "0": a tick has no digits to spare.
fn axis_text(metric: Metric, value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let text = metric.format(value);
    let (number, unit) = text.split_once(' ').map_or((text.as_str(), ""), |(n, u)| (n, u));
    let number =
        if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number };
    format!("{number} {unit}").trim_end().to_owned()
}

/// "median latency (lower is better)".
pub(crate) fn axis_title(metric: Metric) -> String {
    format!("{} ({})", metric.label(), metric.better().label())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::fixture;

    #[test]
    fn ticks_are_round_and_begin_at_zero() {
        let axis = |most, metric| {
            let axis = Axis::from_zero(most, metric, 4);
            axis.ticks.iter().map(|&t| axis_text(metric, t)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(axis(1.64e6, Metric::OpsPerS), "0 500 k 1 M 1.5 M 2 M");
        assert_eq!(axis(4_100.0, Metric::P50Ns), "0 2 us 4 us 6 us");
        assert_eq!(axis(2.9 * 1048576.0, Metric::MemoryBytes), "0 1 MiB 2 MiB 3 MiB");
        assert_eq!(axis(0.0, Metric::WakeupsPerS), "0");
        assert_eq!(axis(1.0, Metric::Fairness), "0 0.5 1");
    }

    #[test]
    fn logarithmic_ticks_hold_all() {
        assert_eq!(log_ticks(230.0, 4_100.0), [200.0, 500.0, 1000.0, 2000.0, 5000.0]);
        assert_eq!(log_ticks(230.0, 4_100_000.0), [100.0, 1e3, 1e4, 1e5, 1e6, 1e7]);
        assert_eq!(log_ticks(100.0, 100.0), [100.0, 200.0]);
    }

    #[test]
    fn the_tail_ends_where_ten_requests_are_left() {
        let line = tail(&[(100, 900), (200, 90), (400, 9), (1000, 1)], 4.0);
        assert_eq!(line, [(0.0, 100.0), (1.0, 200.0), (2.0, 400.0)].map(|(n, ns): (f64, f64)| (n, ns)));
        assert!(tail(&[], 4.0).is_empty());
        assert_eq!(tail(&[(100, 1)], 4.0), []);
    }

    #[test]
    fn a_bar_is_as_long_as_its_figure() {
        let results = fixture::results(5);
        let mut cell = results.cell("block/null/randread-4k/qd32/q1/poll").unwrap().clone();
        for (i, series) in cell.systems.iter_mut().enumerate() {
            for sample in &mut series.samples {
                sample.values.insert(Metric::OpsPerS, 1e6 * (i + 1) as f64);
            }
        }
        let svg = bars(&results, &cell, Metric::OpsPerS, "thread").unwrap().into_string();
        let widths: Vec<f64> = svg
            .split("class=\"bar\"")
            .skip(1)
            .map(|s| s.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
            .collect();
        for (i, width) in widths.iter().enumerate() {
            assert!((width / widths[0] - (i + 1) as f64).abs() < 0.03, "{widths:?}");
        }
        assert_eq!(bars(&results, &cell, Metric::WakeupsPerS, "thread").map(Markup::into_string), None);
    }

    proptest! {
        #[test]
        fn labels_do_not_overlap(wanted in proptest::collection::vec(0.0..200.0f64, 0..14)) {
            let placed = spread(&wanted, 14.0, 0.0, 200.0);
            let mut sorted = placed.clone();
            sorted.sort_by(f64::total_cmp);
            prop_assert!(sorted.windows(2).all(|w| w[1] - w[0] >= 13.999), "{placed:?}");
            prop_assert!(sorted.iter().all(|p| (-0.001..=200.001).contains(p)), "{placed:?}");
        }

        #[test]
        fn an_axis_holds_what_it_shows(most in 1e-4..1e12f64, metric in proptest::sample::select(&Metric::ALL)) {
            let axis = Axis::from_zero(most, metric, 4);
            prop_assert!(axis.end >= most * 0.999_99 && axis.end <= most * 3.5);
            prop_assert!((2..=8).contains(&axis.ticks.len()), "{:?}", axis.ticks);
        }
    }
}

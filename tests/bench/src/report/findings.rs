//! What the figures of a run say, in sentences.

use crate::metric::times;
use crate::report::targets::{CARD, INLINE, QEMU, SLEEPING_CARD, THREAD, matches, of_role};
use crate::results::{Cell, Metric, Results};

/// A sentence: the figure that it is about, and the rest of it.
#[derive(Debug, PartialEq)]
pub(crate) struct Finding {
    pub(crate) figure: String,
    pub(crate) text: String,
}

/// What a reader should know first, as far as the run shows it.
pub(crate) fn findings(results: &Results) -> Vec<Finding> {
    let random_read =
        |backing: &str, depth: u32| results.cell(&format!("block/{backing}/randread-4k/qd{depth}/q1/poll"));
    [
        random_read("null", 32).and_then(|c| throughput(c, "with an engine that completes at once")),
        random_read("null", 1).and_then(latency),
        user_exits(results),
        random_read("buffered", 32).and_then(|c| throughput(c, "from a file in the page cache")),
        random_read("direct", 32).and_then(|c| throughput(c, "from a file by O_DIRECT")),
        backend_time(random_read("null", 32)),
        lost(results),
        bulk(results),
        scale(results),
        start_up(results),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// "3.9x (3.7 to 4.1) inline", or that the two cannot be told apart.
fn against(cell: &Cell, system: &str, role: &'static [&'static str], metric: Metric) -> Option<String> {
    let other = of_role(cell, role)?;
    let ratio = cell.ratio(system, other, metric)?;
    let range = format!("{} to {}", times(ratio.low), times(ratio.high));
    Some(if ratio.excludes(1.0) {
        format!("{} that of {other} ({range})", times(ratio.value))
    } else {
        format!("not told apart from {other} ({}, {range})", times(ratio.value))
    })
}

/// The comparisons that there are, as a list.
fn list(parts: Vec<Option<String>>) -> String {
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    match parts.split_last() {
        None => String::new(),
        Some((last, [])) => format!(": {last}"),
        Some((last, first)) => format!(": {}, and {last}", first.join(", ")),
    }
}

fn throughput(cell: &Cell, what: &str) -> Option<Finding> {
    let system = of_role(cell, CARD)?;
    let metric = Metric::OpsPerS;
    let ops = cell.summary(system, metric)?.median;
    let compared = list([THREAD, INLINE, QEMU].map(|role| against(cell, system, role, metric)).to_vec());
    Some(Finding {
        figure: format!("{} IOPS", metric.format(ops)),
        text: format!("is what {system} serves of 4 KiB random reads at queue depth 32 {what}{compared}."),
    })
}

fn latency(cell: &Cell) -> Option<Finding> {
    let system = of_role(cell, CARD)?;
    let metric = Metric::P50Ns;
    let p50 = cell.summary(system, metric)?.median;
    let compared = list([THREAD, INLINE, QEMU].map(|role| against(cell, system, role, metric)).to_vec());
    Some(Finding {
        figure: metric.format(p50),
        text: format!(
            "is the median latency of one request at a time with {system} and the same engine{compared}."
        ),
    })
}

fn user_exits(results: &Results) -> Option<Finding> {
    let metric = Metric::UserExitsPerOp;
    let most = |role| {
        let cells = results.cells.iter().filter(|c| c.suite == "block");
        let seen = cells.filter_map(|c| Some(c.summary(of_role(c, role)?, metric)?.max));
        seen.fold((0u32, 0.0f64), |(n, most), max| (n + 1, most.max(max)))
    };
    let (cells, with_card) = most(CARD);
    let (others, inline) = most(INLINE);
    let beside =
        if others > 0 { format!("; inline it is up to {}", metric.format(inline)) } else { String::new() };
    (cells > 0).then(|| Finding {
        figure: format!("{} exits", metric.format(with_card)),
        text: format!("to user space per request are the most that a vCPU with a card had in any of {cells} block workloads{beside}."),
    })
}

fn backend_time(cell: Option<&Cell>) -> Option<Finding> {
    let cell = cell?;
    let system = of_role(cell, CARD)?;
    let metric = Metric::BackendNsPerOp;
    let spent = cell.summary(system, metric)?.median;
    let copy = cell.summary(system, Metric::CopyNs)?.median;
    Some(Finding {
        figure: metric.format(spent),
        text: format!(
            "of CPU is what the card spends on a request at queue depth 32 without payload; a memcpy of 4 KiB takes {} here.",
            metric.format(copy)
        ),
    })
}

fn lost(results: &Results) -> Option<Finding> {
    let cell = results.cells.iter().filter(|c| c.suite == "jitter").max_by_key(|c| rate(c))?;
    let system = of_role(cell, CARD)?;
    let metric = Metric::LostPercent;
    let percent = |system: &str| Some(metric.format(cell.summary(system, metric)?.median));
    let others: Vec<String> = [THREAD, INLINE, QEMU]
        .into_iter()
        .filter_map(|role| of_role(cell, role))
        .filter_map(|other| Some(format!("{} with {other}", percent(other)?)))
        .collect();
    let others = if others.is_empty() { String::new() } else { format!("; it is {}", others.join(", ")) };
    Some(Finding {
        figure: percent(system)?,
        text: format!(
            "of its CPU is what a computing guest loses to {} requests per second with {system}{others}.",
            rate(cell)
        ),
    })
}

fn rate(cell: &Cell) -> u64 {
    cell.parameters.get("rate").and_then(|r| r.parse().ok()).unwrap_or(0)
}

fn bulk(results: &Results) -> Option<Finding> {
    let cell = results.cells.iter().find(|c| matches("network/bulk*/to-guest/poll", &c.id))?;
    let system = of_role(cell, CARD)?;
    let metric = Metric::BytesPerS;
    let bytes = cell.summary(system, metric)?.median;
    let compared = list([THREAD, QEMU].map(|role| against(cell, system, role, metric)).to_vec());
    Some(Finding {
        figure: metric.format(bytes),
        text: format!("go from guest to guest in bulk through {system}{compared}."),
    })
}

fn scale(results: &Results) -> Option<Finding> {
    let guests = |c: &Cell| c.parameters.get("vms").and_then(|v| v.parse::<u32>().ok());
    let cells = results.cells.iter().filter(|c| c.suite == "scale");
    let most = cells.clone().max_by_key(|c| guests(c))?;
    let one = cells.min_by_key(|c| guests(c))?;
    let system = of_role(most, SLEEPING_CARD)?;
    let metric = Metric::OpsPerS;
    let (many_ops, one_ops) = (most.summary(system, metric)?.median, one.summary(system, metric)?.median);
    let fairness = most.summary(system, Metric::Fairness);
    let fair = fairness.map(|s| format!(", with a fairness of {}", Metric::Fairness.format(s.median)));
    (guests(most)? > guests(one)?).then(|| Finding {
        figure: format!("{} IOPS", metric.format(many_ops)),
        text: format!(
            "in all is what {} VMs get from one {system}, where {} got {}{}.",
            guests(most).unwrap_or_default(),
            guests(one).unwrap_or_default(),
            metric.format(one_ops),
            fair.unwrap_or_default()
        ),
    })
}

fn start_up(results: &Results) -> Option<Finding> {
    let cell = results.cells.iter().find(|c| c.id.starts_with("start-up/"))?;
    let system = of_role(cell, CARD)?;
    let line =
        |system: &str| Some(Metric::FirstLineNs.format(cell.summary(system, Metric::FirstLineNs)?.median));
    let memory =
        |system: &str| Some(Metric::MemoryBytes.format(cell.summary(system, Metric::MemoryBytes)?.median));
    let other = of_role(cell, QEMU)
        .and_then(|qemu| Some(format!("; {qemu} takes {} and {}", line(qemu)?, memory(qemu)?)))
        .unwrap_or_default();
    Some(Finding {
        figure: line(system)?,
        text: format!(
            "pass from the start of our hypervisor to its guest's first line, and the process has {} beyond guest RAM{other}.",
            memory(system)?
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    #[test]
    fn a_whole_run_says_all_of_it() {
        let findings = findings(&fixture::results(5));
        assert_eq!(findings.len(), 10);
        let text = &findings[0].text;
        assert!(text.contains("that of inline (") && text.contains("not told apart from thread ("), "{text}");
        assert!(findings[2].figure == "0.00 exits" && findings[2].text.contains("12 block workloads"));
        assert!(findings[6].text.contains("10000 requests per second"), "{findings:?}");
        assert!(
            findings[8].text.contains("64 VMs") && findings[8].text.contains("where 1 got"),
            "{findings:?}"
        );
    }

    #[test]
    fn a_part_of_a_run_says_what_it_can() {
        let mut results = fixture::results(5);
        results.cells.retain(|c| c.suite == "start-up");
        for cell in &mut results.cells {
            cell.systems.retain(|s| s.system == "card-poll");
        }
        let findings = findings(&results);
        assert_eq!(findings.len(), 1);
        assert!(!findings[0].text.contains("qemu"), "{findings:?}");
        results.cells.clear();
        assert_eq!(super::findings(&results), []);
    }
}

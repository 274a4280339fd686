//! What `/metrics` shows of the index.

use prometheus::{Encoder, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use terrace_index::Counts;

/// Gauges and counters that are set when they are read.
#[derive(Debug)]
pub(super) struct Gauges {
    registry: Registry,
    entries: IntGauge,
    blocks: IntGauge,
    bytes: IntGauge,
    holders: IntGauge,
    evicted: IntCounter,
    behind: IntGaugeVec,
    connected: IntGaugeVec,
    events: IntCounterVec,
    snapshots: IntCounterVec,
}

/// One daemon, as it is shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    pub(super) daemon: &'a str,
    /// Whether there is a session.
    pub(super) connected: bool,
    /// Whether its blocks are known.
    pub(super) known: bool,
    pub(super) behind: u64,
    pub(super) applied: u64,
    pub(super) snapshots: u64,
}

impl Gauges {
    /// # Errors
    /// When two metrics have one name, which a test rules out.
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let gauges = |name: &str, help: &str| {
            let gauges = IntGaugeVec::new(Opts::new(name, help), &["daemon"])?;
            registry.register(Box::new(gauges.clone()))?;
            Ok::<_, prometheus::Error>(gauges)
        };
        let counters = |name: &str, help: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &["daemon"])?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let evicted = IntCounter::new(
            "terrace_router_index_evicted_total",
            "Entries of the index that were forgotten to stay within --index-bytes-max.",
        )?;
        registry.register(Box::new(evicted.clone()))?;
        Ok(Self {
            entries: gauge("terrace_router_index_entries", "Pairs of block and holder in the index.")?,
            blocks: gauge("terrace_router_index_blocks", "Different blocks in the index.")?,
            bytes: gauge("terrace_router_index_bytes", "Memory that the index takes.")?,
            holders: gauge("terrace_router_index_holders", "Daemons whose blocks are known.")?,
            evicted,
            behind: gauges(
                "terrace_router_index_behind_events",
                "Events that had happened on a daemon when it sent the last ones that were applied.",
            )?,
            connected: gauges("terrace_router_index_connected", "1 while there is a session with a daemon.")?,
            events: counters("terrace_router_index_events_total", "Events of a daemon that were applied.")?,
            snapshots: counters(
                "terrace_router_index_snapshots_total",
                "Snapshots of a daemon that were begun; each but the first is a resync.",
            )?,
            registry,
        })
    }

    /// The Prometheus text.
    ///
    /// # Errors
    /// When a metric cannot be written, which a test rules out.
    pub(super) fn text(&self, counts: Counts, rows: &[Row<'_>]) -> Result<String, prometheus::Error> {
        let whole = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.entries.set(whole(counts.entries));
        self.blocks.set(whole(counts.blocks));
        self.bytes.set(whole(counts.bytes));
        self.holders.set(whole(rows.iter().filter(|row| row.known).count() as u64));
        raise(&self.evicted, counts.evicted);
        for row in rows {
            let label = &[row.daemon];
            self.behind.with_label_values(label).set(whole(row.behind));
            self.connected.with_label_values(label).set(i64::from(row.connected));
            raise(&self.events.with_label_values(label), row.applied);
            raise(&self.snapshots.with_label_values(label), row.snapshots);
        }
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Counters only rise, so that two readers at once do no harm but to count one step twice.
fn raise(counter: &IntCounter, count: u64) {
    counter.inc_by(count.saturating_sub(counter.get()));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dashboards need names and values: build the page twice and read it.
    #[test]
    fn the_page_can_be_read() {
        let gauges = Gauges::new().unwrap();
        let counts = Counts { entries: 7, evicted: 3, ..Counts::default() };
        let row =
            |applied| Row { daemon: "a", connected: true, known: true, behind: 4, applied, snapshots: 2 };
        gauges.text(counts, &[row(5)]).unwrap();
        let text = gauges.text(counts, &[row(9)]).unwrap();
        for line in [
            "terrace_router_index_entries 7",
            "terrace_router_index_evicted_total 3",
            "terrace_router_index_holders 1",
            "terrace_router_index_behind_events{daemon=\"a\"} 4",
            "terrace_router_index_events_total{daemon=\"a\"} 9",
            "terrace_router_index_snapshots_total{daemon=\"a\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}

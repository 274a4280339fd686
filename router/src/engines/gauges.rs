//! What `/metrics` shows of the engines.

use prometheus::{Encoder, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use super::publisher::Row;

/// Gauges and counters that are set when they are read.
#[derive(Debug)]
pub(super) struct Gauges {
    registry: Registry,
    holders: IntGauge,
    connected: IntGaugeVec,
    /// In the order of [`Gauges::counts`].
    counters: Vec<IntCounterVec>,
}

const COUNTERS: [(&str, &str); 6] = [
    ("terrace_router_engine_batches_total", "Batches of an engine's events that were applied."),
    ("terrace_router_engine_events_total", "Events in these batches."),
    ("terrace_router_engine_repeated_total", "Batches that had been applied before."),
    ("terrace_router_engine_gaps_total", "Times that batches of an engine were missing."),
    (
        "terrace_router_engine_forgotten_total",
        "Times that an engine's blocks were forgotten: a new life of it, or batches that could not be had.",
    ),
    ("terrace_router_engine_bad_total", "Messages of an engine that are no batch of events."),
];

impl Gauges {
    /// # Errors
    /// When two metrics have one name, which a test rules out.
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let holders = IntGauge::new(
            "terrace_router_engine_holders",
            "Publishers whose blocks are in the index, ranks counted apart.",
        )?;
        registry.register(Box::new(holders.clone()))?;
        let help = "1 while there is a connection with an engine's events.";
        let connected = IntGaugeVec::new(Opts::new("terrace_router_engine_connected", help), &["engine"])?;
        registry.register(Box::new(connected.clone()))?;
        let mut counters = Vec::new();
        for (name, help) in COUNTERS {
            let counter = IntCounterVec::new(Opts::new(name, help), &["engine"])?;
            registry.register(Box::new(counter.clone()))?;
            counters.push(counter);
        }
        Ok(Self { registry, holders, connected, counters })
    }

    fn counts(row: Row) -> [u64; 6] {
        [row.batches, row.events, row.repeated, row.gaps, row.forgotten, row.bad]
    }

    /// The Prometheus text.
    ///
    /// # Errors
    /// When a metric cannot be written, which a test rules out.
    pub(super) fn text<'a>(
        &self,
        rows: impl Iterator<Item = (&'a str, Row)>,
        holders: usize,
    ) -> Result<String, prometheus::Error> {
        self.holders.set(i64::try_from(holders).unwrap_or(i64::MAX));
        for (engine, row) in rows {
            self.connected.with_label_values(&[engine]).set(i64::from(row.connected));
            for (counter, count) in self.counters.iter().zip(Self::counts(row)) {
                let counter = counter.with_label_values(&[engine]);
                // Counters only rise, so that two readers at once do no harm but to count one step twice.
                counter.inc_by(count.saturating_sub(counter.get()));
            }
        }
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A count under another's name would mislead whoever looks for lost events: build the page twice and read it.
    #[test]
    fn the_page_can_be_read() {
        let gauges = Gauges::new().unwrap();
        let row = Row { connected: true, batches: 1, events: 2, repeated: 3, gaps: 4, forgotten: 5, bad: 6 };
        gauges.text([("v", Row { batches: 0, ..row })].into_iter(), 1).unwrap();
        let text = gauges.text([("v", row)].into_iter(), 7).unwrap();
        for line in [
            "terrace_router_engine_holders 7",
            "terrace_router_engine_connected{engine=\"v\"} 1",
            "terrace_router_engine_batches_total{engine=\"v\"} 1",
            "terrace_router_engine_events_total{engine=\"v\"} 2",
            "terrace_router_engine_repeated_total{engine=\"v\"} 3",
            "terrace_router_engine_gaps_total{engine=\"v\"} 4",
            "terrace_router_engine_forgotten_total{engine=\"v\"} 5",
            "terrace_router_engine_bad_total{engine=\"v\"} 6",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}

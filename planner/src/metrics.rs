//! What the planner shows on `/metrics`.

use prometheus::{CounterVec, Encoder, GaugeVec, Opts, Registry, TextEncoder};

use crate::size::Role;

/// Gauges and counters of one planner.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    wanted: GaugeVec,
    running: GaugeVec,
    starts: CounterVec,
    exits: CounterVec,
    decisions: CounterVec,
}

impl Metrics {
    /// # Errors
    /// When two metrics have one name, which a test rules out.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| {
            let gauge = GaugeVec::new(Opts::new(name, help), &["role"])?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let counter = |name: &str, help: &str| {
            let counter = CounterVec::new(Opts::new(name, help), &["role"])?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let metrics = Self {
            wanted: gauge("terrace_planner_workers_wanted", "Workers that the planner wants, by role.")?,
            running: gauge("terrace_planner_workers_running", "Workers that run, by role.")?,
            starts: counter("terrace_planner_starts_total", "Workers started, by role.")?,
            exits: counter("terrace_planner_exits_total", "Workers that ended unasked, by role.")?,
            decisions: counter("terrace_planner_decisions_total", "Changes of the wanted number, by role.")?,
            registry,
        };
        for role in [Role::Prefill, Role::Decode] {
            metrics.fleet(role, 0, 0);
            for counter in [&metrics.starts, &metrics.exits, &metrics.decisions] {
                counter.with_label_values(&[role.name()]).reset();
            }
        }
        Ok(metrics)
    }

    pub(crate) fn fleet(&self, role: Role, wanted: u32, running: u32) {
        self.wanted.with_label_values(&[role.name()]).set(f64::from(wanted));
        self.running.with_label_values(&[role.name()]).set(f64::from(running));
    }

    pub(crate) fn started(&self, role: Role) {
        self.starts.with_label_values(&[role.name()]).inc();
    }

    pub(crate) fn exited(&self, role: Role) {
        self.exits.with_label_values(&[role.name()]).inc();
    }

    pub(crate) fn decided(&self, role: Role) {
        self.decisions.with_label_values(&[role.name()]).inc();
    }

    /// The Prometheus text.
    pub(crate) fn text(&self) -> Result<String, prometheus::Error> {
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two metrics of one name, or one without help, would break the page: build and read it.
    #[test]
    fn every_metric_has_help() {
        let text = Metrics::new().unwrap().text().unwrap();
        assert_eq!(text.matches("# HELP").count(), 5);
        assert!(text.contains("terrace_planner_exits_total{role=\"decode\"} 0"));
    }
}

//! Figures of both sides by name: medians over the rounds, one JSON line each.

/// A figure of both.
struct Pair {
    name: String,
    unit: &'static str,
    /// Whether more is better.
    higher: bool,
    bar: Option<f64>,
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

/// All figures, in the order in which they were first measured.
#[derive(Default)]
pub(crate) struct Pairs(Vec<Pair>);

impl Pairs {
    /// A figure of which more is better. Ours over the peer's must reach `bar`.
    pub(crate) fn higher(
        &mut self,
        name: &str,
        ours: f64,
        theirs: f64,
        bar: Option<f64>,
        unit: &'static str,
    ) {
        self.add(name, (ours, theirs), bar, unit, true);
    }

    /// A figure of which less is better. The peer's over ours must reach `bar`.
    pub(crate) fn lower(&mut self, name: &str, ours: f64, theirs: f64, bar: Option<f64>, unit: &'static str) {
        self.add(name, (ours, theirs), bar, unit, false);
    }

    fn add(&mut self, name: &str, values: (f64, f64), bar: Option<f64>, unit: &'static str, higher: bool) {
        eprintln!("{name}: {:.3} to {:.3} {unit}", values.0, values.1);
        let at = self.0.iter().position(|pair| pair.name == name).unwrap_or_else(|| {
            let (ours, theirs) = (Vec::new(), Vec::new());
            self.0.push(Pair { name: name.to_owned(), unit, higher, bar, ours, theirs });
            self.0.len() - 1
        });
        self.0[at].ours.push(values.0);
        self.0[at].theirs.push(values.1);
    }

    /// Prints a line for each figure, in the form of `terrace bench -o json`.
    pub(crate) fn print(&mut self) {
        for pair in &mut self.0 {
            let (value, limit) = (median(&mut pair.ours), median(&mut pair.theirs));
            let ratio = if pair.higher { value / limit } else { limit / value };
            let ok = pair.bar.is_none_or(|bar| ratio >= bar);
            let line = serde_json::json!({
                "name": pair.name, "value": value, "unit": pair.unit, "limit": limit, "ratio": ratio,
                "bar": pair.bar, "ok": ok,
            });
            println!("{line}");
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

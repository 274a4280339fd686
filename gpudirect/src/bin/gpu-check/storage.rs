//! A drive and the device: cuFile, by calls and in batches, against reading into
//! pinned memory and copying, and what is chosen against what drive and link allow.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, MIB};
use terrace_gpudirect::{Device, DeviceKind, FileChoice, FileRate, Submission, measure_files};

use crate::rows::Rows;

pub(crate) const NAMES: &[&str] = &[
    "nvme_to_device_chosen_2097152",
    "nvme_to_device_chosen_368640",
    "nvme_to_device_chosen_to_other_2097152",
    "nvme_to_device_chosen_to_other_368640",
];
const BLOCKS: [u64; 2] = [2 * MIB, 368_640];
/// For each measurement.
const WITHIN: Duration = Duration::from_secs(40);

pub(crate) fn measure(
    device: &Arc<dyn Device>,
    dir: &Path,
    rows: &mut Rows,
    until: Instant,
    pcie: Option<f64>,
) {
    if Instant::now() > until {
        return NAMES.iter().for_each(|name| rows.skip(name, "no time is left"));
    }
    let blocks = BLOCKS.map(ByteCount::new);
    let mut first: Option<FileChoice> = None;
    for (label, submission) in
        [("calls", Submission::Calls), ("batches", Submission::Batches), ("again", Submission::Calls)]
    {
        match measure_files(device, dir, &blocks, submission, WITHIN) {
            Ok(again) if label == "again" => {
                let judged = device.info().kind == DeviceKind::Cuda;
                against_other(rows, &first.take().unwrap_or_default(), &again, judged);
            }
            Ok(choice) => {
                for rate in &choice.rates {
                    one(device, rows, label, rate, pcie);
                }
                first.get_or_insert(choice);
            }
            Err(error) => {
                let why = format!("{} cannot be measured: {error}", dir.display());
                return NAMES.iter().for_each(|name| rows.skip(name, &why));
            }
        }
    }
}

fn one(device: &Arc<dyn Device>, rows: &mut Rows, label: &str, rate: &FileRate, pcie: Option<f64>) {
    let block = rate.block.get();
    let name = |what: &str| format!("nvme_to_device_{what}_{block}");
    let gigabytes = |rate: f64| rate * 1e-9;
    let cufile = name(&format!("cufile_{label}"));
    match &rate.direct {
        Ok(direct) => rows.plain(&cufile, gigabytes(*direct), "GB/s"),
        Err(error) => rows.skip(&cufile, &error.to_string()),
    }
    // The other way does not depend on how cuFile is called: it is judged once.
    if label != "calls" {
        return;
    }
    match &rate.bounce {
        Ok(bounce) => rows.plain(&name("pinned"), gigabytes(*bounce), "GB/s"),
        Err(error) => rows.fail(&name("pinned"), &error.to_string()),
    }
    let chosen = if rate.is_direct() { &rate.direct } else { &rate.bounce };
    match (chosen, &rate.read) {
        (Ok(chosen), Ok(read)) => {
            // Neither can be passed: the drive's rate, or the link's where that is less.
            let ceiling = gigabytes(*read).min(pcie.unwrap_or(f64::MAX));
            let bar = (device.info().kind == DeviceKind::Cuda).then_some(0.9);
            rows.part_of(&name("chosen"), gigabytes(*chosen), ceiling, bar, "GB/s");
        }
        (Err(error), _) | (_, Err(error)) => rows.fail(&name("chosen"), &error.to_string()),
    }
}

/// The chosen path against the other one, both measured again: a choice that was chance would show.
fn against_other(rows: &mut Rows, chosen: &FileChoice, again: &FileChoice, judged: bool) {
    for rate in &again.rates {
        let name = format!("nvme_to_device_chosen_to_other_{}", rate.block.get());
        match (&rate.direct, &rate.bounce) {
            (Ok(direct), Ok(bounce)) => {
                let by_choice =
                    if chosen.is_direct(rate.block) { (direct, bounce) } else { (bounce, direct) };
                let (chosen, other) = (by_choice.0 * 1e-9, by_choice.1 * 1e-9);
                rows.part_of(&name, chosen, other, judged.then_some(0.95), "GB/s");
            }
            (Err(error), _) | (_, Err(error)) => {
                rows.skip(&name, &format!("there is one path only: {error}"));
            }
        }
    }
}

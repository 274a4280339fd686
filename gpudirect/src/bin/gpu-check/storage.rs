//! A drive and the device: cuFile, by calls, in batches and by streams, against reading into
//! pinned memory and copying, and what is chosen against what drive and link allow.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, MIB};
use terrace_gpudirect::{Device, DeviceKind, FileChoice, FileRate, measure_files};

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
    let choice = match measure_files(device, dir, &blocks, WITHIN) {
        Ok(choice) => choice,
        Err(error) => {
            let why = format!("{} cannot be measured: {error}", dir.display());
            return NAMES.iter().for_each(|name| rows.skip(name, &why));
        }
    };
    for rate in &choice.rates {
        one(device, rows, rate, pcie);
    }
    match measure_files(device, dir, &blocks, WITHIN) {
        Ok(again) => against_other(rows, &choice, &again, device.info().kind == DeviceKind::Cuda),
        Err(error) => {
            let why = format!("{} cannot be measured again: {error}", dir.display());
            let rates = choice.rates.iter().map(|rate| rate.block);
            rates.for_each(|block| rows.skip(&to_other(block), &why));
        }
    }
}

fn to_other(block: ByteCount) -> String {
    format!("nvme_to_device_chosen_to_other_{}", block.get())
}

fn one(device: &Arc<dyn Device>, rows: &mut Rows, rate: &FileRate, pcie: Option<f64>) {
    let block = rate.block.get();
    let name = |what: &str| format!("nvme_to_device_{what}_{block}");
    let gigabytes = |rate: f64| rate * 1e-9;
    for (submission, direct) in &rate.direct {
        let cufile = name(&format!("cufile_{}", submission.label()));
        match direct {
            Ok(direct) => rows.plain(&cufile, gigabytes(*direct), "GB/s"),
            Err(error) => rows.skip(&cufile, &error.to_string()),
        }
    }
    match &rate.bounce {
        Ok(bounce) => rows.plain(&name("pinned"), gigabytes(*bounce), "GB/s"),
        Err(error) => rows.fail(&name("pinned"), &error.to_string()),
    }
    let direct = rate.choice().and_then(|submission| rate.by(submission));
    match (direct.map_or_else(|| rate.bounce.clone(), Ok), &rate.read) {
        (Ok(chosen), Ok(read)) => {
            // Neither can be passed: the drive's rate, or the link's where that is less.
            let ceiling = gigabytes(*read).min(pcie.unwrap_or(f64::MAX));
            let bar = (device.info().kind == DeviceKind::Cuda).then_some(0.9);
            rows.part_of(&name("chosen"), gigabytes(chosen), ceiling, bar, "GB/s");
        }
        (Err(error), _) => rows.fail(&name("chosen"), &error.to_string()),
        (_, Err(error)) => rows.fail(&name("chosen"), &error.to_string()),
    }
}

/// The chosen path against the other one, both measured again: a choice that was chance would show.
fn against_other(rows: &mut Rows, chosen: &FileChoice, again: &FileChoice, judged: bool) {
    for rate in &again.rates {
        let name = to_other(rate.block);
        let best = rate.best().map(|(_, rate)| rate);
        let (Some(best), Ok(bounce)) = (best, &rate.bounce) else {
            let errors = rate.direct.iter().filter_map(|(_, rate)| rate.as_ref().err());
            let error = errors.chain(rate.bounce.as_ref().err()).next();
            let why = error.map(ToString::to_string).unwrap_or_default();
            rows.skip(&name, &format!("there is one path only: {why}"));
            continue;
        };
        let (chosen, other) = match chosen.submission(rate.block) {
            // One that worked and works no more is worth nothing.
            Some(submission) => (rate.by(submission).unwrap_or_default(), *bounce),
            None => (*bounce, best),
        };
        rows.part_of(&name, chosen * 1e-9, other * 1e-9, judged.then_some(0.95), "GB/s");
    }
}

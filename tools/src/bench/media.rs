//! `bench media`: reads and writes of blocks through media, as the daemon makes
//! them (header page, checksum, scheduler, completion), against a bare io_uring
//! loop over the same memory, file and offsets, and against fio.
//!
//! Blocks are read in no order, and as prompts have them: some behind each other, which media reads together.
//! Depth is what the device has at once, for all of them. Rounds are interleaved and medians are compared. A second bare
//! loop compares what it reads with its checksum, as media does: what it loses against the first is the price of looking
//! at the bytes on this machine, where the processor and the device share one memory. Write amplification is that of a
//! whole daemon.

mod churn;
mod fio;
mod rig;

use anyhow::Context;
use terrace_core::{GIB, MIB};
use terrace_media::bare::BareOp;

use super::{Line, Options, blocks, median, stand};
use rig::{Kind, Pattern, Rig};

/// Payloads that are measured: the block of a small model, and that of a large one.
const BLOCKS: [u64; 2] = [blocks::MODEL_BLOCK_BYTES, 2 * MIB];
const DEPTHS: [usize; 4] = [1, 4, 16, 32];
/// Odd, so that a median is a round.
const ROUNDS: usize = 9;
/// Bytes of one round of one engine: about what fio moves in its time. A disk that completes its whole queue at once is
/// measured too low or too high by a part of one queue, if not everything counts that was asked for.
const ROUND_BYTES: u64 = 1024 * MIB;
/// Part of the bare loop's rate and of fio's that media must reach.
const BARE_BAR: f64 = 0.95;
const FIO_BAR: f64 = 0.97;
/// CPU seconds a GiB read that media may use beyond the checksum.
const CPU_MAX: f64 = 0.025;
/// Depth at which CPU time is judged: at less, most of it is the kernel going to sleep and waking up.
const CPU_DEPTH: usize = 16;

pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let path = dir.path().to_owned();
    // It blocks for minutes.
    let measured = tokio::task::spawn_blocking(move || {
        let mut lines = Vec::new();
        for block_bytes in BLOCKS {
            lines.extend(one_size(&path, block_bytes)?);
        }
        anyhow::Ok(lines)
    });
    let mut lines = measured.await??;
    drop(dir);
    lines.extend(churn::run(options).await?);
    Ok(lines)
}

/// Rates in GiB/s and CPU seconds a GiB of each round.
#[derive(Default)]
struct Rounds {
    media: Vec<f64>,
    media_cpu: Vec<f64>,
    bare: Vec<f64>,
    bare_cpu: Vec<f64>,
    checked: Vec<f64>,
    checked_cpu: Vec<f64>,
    fio: Vec<f64>,
    /// Media with as few frames as fio has buffers.
    few: Vec<f64>,
    /// Media and the bare loop over the blocks of prompts.
    prompts: Vec<f64>,
    prompts_cpu: Vec<f64>,
    prompts_bare: Vec<f64>,
    prompts_bare_cpu: Vec<f64>,
}

fn one_size(dir: &std::path::Path, block_bytes: u64) -> anyhow::Result<Vec<Line>> {
    let mut rig = Rig::new(dir, block_bytes).context("cannot set up the media to be measured")?;
    eprintln!("blocks of {block_bytes} bytes in {}", rig.pages());
    let name = block_bytes.to_string();
    let checksum = rig.checksum_seconds_per_gib()?;
    let mut lines = vec![Line::plain(&format!("media_{name}_checksum_cpu"), checksum, "s/GiB")];
    // It takes minutes: what is known already is said.
    let say = |lines: &[Line]| lines.iter().for_each(Line::say);
    say(&lines);
    for kind in [Kind::Read, Kind::Write] {
        for depth in DEPTHS {
            let rounds = compare(&mut rig, kind, depth)?;
            let known = lines.len();
            lines.extend(judge(&rounds, &format!("media_{name}_{}_{depth}", kind.label()), kind));
            if kind == Kind::Read {
                lines.extend(judge_cpu(&rounds, &name, depth, checksum));
            }
            say(&lines[known..]);
        }
    }
    Ok(lines)
}

fn compare(rig: &mut Rig, kind: Kind, depth: usize) -> anyhow::Result<Rounds> {
    let count = usize::try_from(ROUND_BYTES / rig.frame_bytes())?;
    let mut rounds = Rounds::default();
    let moved = float(count as u64 * rig.frame_bytes()) / float(GIB);
    let block = float(rig.frame_bytes()) / float(GIB);
    let note = |(seconds, cpu): (f64, f64), rates: &mut Vec<f64>, cpus: &mut Vec<f64>| {
        rates.push(moved / seconds);
        cpus.push(cpu / block);
    };
    for round in 0..ROUNDS {
        // Who goes first changes, so that nobody always finds what another left.
        for turn in 0..7 {
            let (reads, scattered) = (kind == Kind::Read, Pattern::Scattered);
            match (round + turn) % 7 {
                0 => {
                    let took = rig.media((kind, scattered), depth, count, round)?;
                    note(took, &mut rounds.media, &mut rounds.media_cpu);
                }
                1 => {
                    let took = rig.bare((kind.bare(), scattered), depth, count, round)?;
                    note(took, &mut rounds.bare, &mut rounds.bare_cpu);
                }
                2 if reads => {
                    let took = rig.bare((BareOp::ReadChecked, scattered), depth, count, round)?;
                    note(took, &mut rounds.checked, &mut rounds.checked_cpu);
                }
                3 if reads => {
                    let took = rig.media((kind, Pattern::Prompts), depth, count, round)?;
                    note(took, &mut rounds.prompts, &mut rounds.prompts_cpu);
                }
                4 if reads => {
                    let took = rig.bare((kind.bare(), Pattern::Prompts), depth, count, round)?;
                    note(took, &mut rounds.prompts_bare, &mut rounds.prompts_bare_cpu);
                }
                2..=4 => {}
                5 => {
                    let (seconds, _) = rig.media((kind, Pattern::Few), depth, count, round)?;
                    rounds.few.push(moved / seconds);
                }
                _ => rounds.fio.extend(fio::run(rig, kind, depth)?),
            }
        }
    }
    Ok(rounds)
}

/// CPU seconds a GiB read of media, beside both bare loops, and of media over the blocks of prompts, beside the bare loop
/// over the same.
fn judge_cpu(rounds: &Rounds, name: &str, depth: usize, checksum: f64) -> Vec<Line> {
    let scattered = format!("media_{name}_read_{depth}_cpu");
    let prompts = format!("media_{name}_prompts_read_{depth}");
    let at_most = |name: &str, cpus: &[f64]| match depth {
        CPU_DEPTH.. => Line::at_most(name, median(cpus), CPU_MAX + checksum, "s/GiB"),
        _ => Line::plain(name, median(cpus), "s/GiB"),
    };
    vec![
        Line::plain(&format!("{scattered}_bare"), median(&rounds.bare_cpu), "s/GiB"),
        Line::plain(&format!("{scattered}_checked"), median(&rounds.checked_cpu), "s/GiB"),
        at_most(&scattered, &rounds.media_cpu),
        Line::part_of_rounds(&prompts, &rounds.prompts, &rounds.prompts_bare, BARE_BAR, "GiB/s"),
        Line::plain(&format!("{prompts}_cpu_bare"), median(&rounds.prompts_bare_cpu), "s/GiB"),
        at_most(&format!("{prompts}_cpu"), &rounds.prompts_cpu),
    ]
}

fn judge(rounds: &Rounds, name: &str, kind: Kind) -> Vec<Line> {
    let rate = |name: &str, values: &[f64], limits: &[f64], bar| {
        Line::part_of_rounds(name, values, limits, bar, "GiB/s")
    };
    let mut lines = vec![rate(name, &rounds.media, &rounds.bare, BARE_BAR)];
    if kind == Kind::Read {
        let checked = Line::compared(
            &format!("{name}_checked"),
            median(&rounds.media),
            median(&rounds.checked),
            "GiB/s",
        );
        lines.push(checked);
    }
    if rounds.fio.is_empty() {
        eprintln!("fio is not installed, or cannot {} here: not compared", kind.label());
    } else {
        lines.push(rate(&format!("{name}_fio"), &rounds.few, &rounds.fio, FIO_BAR));
    }
    lines
}

/// Exact below 2^53.
#[allow(clippy::cast_precision_loss, reason = "rates need no more than 53 bits")]
fn float(value: u64) -> f64 {
    value as f64
}

//! `prefix hot` and `prefix tree`: what the router's index holds, warmest first.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::Value;

use crate::cli::Target;
use crate::connect::router;
use crate::output::{self, Format};

/// How much of it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Most prefixes that are shown; a tree adds what they begin with
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    limit: u16,
    /// The router, for example http://127.0.0.1:8080 [default: that of a running `terrace up`]
    #[arg(long, env = "TERRACE_ROUTER", value_name = "URL")]
    router: Option<String>,
}

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The warmest first.
    Hot,
    /// What goes on from what, the warmest branches first.
    Tree,
}

pub(crate) async fn run(
    target: &Target,
    format: Format,
    shape: Shape,
    options: &Options,
) -> anyhow::Result<ExitCode> {
    let router = router(target, options.router.as_deref())?;
    let parents = shape == Shape::Tree;
    let url = format!("{}/admin/hot?limit={}&parents={parents}", router.trim_end_matches('/'), options.limit);
    let client = reqwest::Client::builder().no_proxy().build()?;
    let sent = client.get(&url).send().await;
    let response = sent.with_context(|| format!("cannot reach the router at {router}"))?;
    let status = response.status();
    let answer: Value = response
        .json()
        .await
        .with_context(|| format!("{router} is no router that knows prefixes: it answered {status}"))?;
    if !status.is_success() {
        bail!("the router refuses: {}", answer["error"]["message"].as_str().unwrap_or("without a reason"));
    }
    match format {
        Format::Json => output::json(&answer)?,
        Format::Table => print(&answer, shape),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(answer: &Value, shape: Shape) {
    let prefixes = answer["prefixes"].as_array().map_or(&[][..], Vec::as_slice);
    if prefixes.is_empty() {
        println!("nothing is held");
        return;
    }
    let headings =
        ["FIRST BLOCK", ">BLOCKS", ">HELD", ">HBM", ">PINNED", ">NVME", ">SIZE", ">HEAT", "HOLDERS"];
    let mut table = output::table(&headings);
    let order = match shape {
        Shape::Hot => prefixes.iter().map(|prefix| (0, prefix)).collect(),
        Shape::Tree => nested(prefixes),
    };
    for (depth, prefix) in order {
        let number = |field: &str| prefix[field].as_u64().unwrap_or(0);
        let tier = |name: &str| prefix["tiers"][name].as_u64().unwrap_or(0).to_string();
        let names = prefix["holders"].as_array().map_or(&[][..], Vec::as_slice);
        let shown: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
        let more = number("holders_count").saturating_sub(shown.len() as u64);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let first = prefix["first_block"].as_str().unwrap_or("?");
        table.add_row([
            format!("{}{}", "  ".repeat(depth), first.get(..16).unwrap_or(first)),
            number("blocks").to_string(),
            number("entries").to_string(),
            tier("hbm"),
            tier("pinned"),
            tier("nvme"),
            if number("bytes_max") > 0 { output::bytes(number("bytes_max")) } else { "?".to_owned() },
            number("heat").to_string(),
            format!("{}{more}", shown.join(", ")),
        ]);
    }
    output::print(&table);
    println!("{} blocks are known, {} of them shown", answer["blocks_in_all"], answer["blocks_shown"]);
}

/// Depth first, each with its depth; among those that go on from the same one, the order in which they came.
fn nested(prefixes: &[Value]) -> Vec<(usize, &Value)> {
    let number = |prefix: &Value, field: &str| prefix[field].as_u64().unwrap_or(0);
    let shown: Vec<u64> = prefixes.iter().map(|prefix| number(prefix, "number")).collect();
    let mut children: BTreeMap<u64, Vec<&Value>> = BTreeMap::new();
    for prefix in prefixes {
        let parent = number(prefix, "parent");
        // What goes on from something that is not shown stands at the left.
        children.entry(if shown.contains(&parent) { parent } else { 0 }).or_default().push(prefix);
    }
    let mut order = Vec::new();
    let mut left: Vec<(usize, &Value)> =
        children.remove(&0).unwrap_or_default().into_iter().rev().map(|prefix| (0, prefix)).collect();
    while let Some((depth, prefix)) = left.pop() {
        order.push((depth, prefix));
        let below = children.remove(&number(prefix, "number")).unwrap_or_default();
        left.extend(below.into_iter().rev().map(|prefix| (depth + 1, prefix)));
    }
    order
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A branch under the wrong trunk, or one that is lost because its trunk is not shown: each prefix must come
    /// once, behind what it goes on from, and a circle must not hang.
    #[test]
    fn each_prefix_comes_once_behind_its_trunk() {
        let prefix = |number: u64, parent: u64| json!({"number": number, "parent": parent});
        let prefixes = [prefix(5, 1), prefix(1, 0), prefix(7, 99), prefix(6, 1), prefix(8, 6)];
        let order: Vec<(usize, u64)> = nested(&prefixes)
            .into_iter()
            .map(|(depth, prefix)| (depth, prefix["number"].as_u64().unwrap()))
            .collect();
        assert_eq!(order, [(0, 1), (1, 5), (1, 6), (2, 8), (0, 7)]);
        assert!(nested(&[prefix(1, 2), prefix(2, 1)]).is_empty());
    }
}

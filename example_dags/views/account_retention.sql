/* matview
name = "analytics.account_retention"
comment = "Share of each month's new accounts that were active so many weeks after their first week"
depends_on = ["analytics.account_weeks"]
unique_index_columns = ["cohort", "plan", "weeks_since_start"]

[grants]
reporting = ["SELECT"]

[[indexes]]
columns = ["plan", "weeks_since_start"]

[[indexes]]
name = "account_retention_first_quarter"
columns = ["cohort"]
where = "weeks_since_start <= 13"
*/
WITH starts AS (
    SELECT account_id, plan, min(week) AS first_week
    FROM analytics.account_weeks
    GROUP BY account_id, plan
),
cohorts AS (
    SELECT
        account_id,
        plan,
        first_week,
        date_trunc('month', first_week)::date AS cohort,
        count(*) OVER (PARTITION BY date_trunc('month', first_week), plan) AS cohort_size
    FROM starts
)
SELECT
    cohorts.cohort,
    cohorts.plan,
    (activity.week - cohorts.first_week) / 7 AS weeks_since_start,
    cohorts.cohort_size,
    count(*) AS active_accounts,
    round(count(*)::numeric / cohorts.cohort_size, 4) AS retention,
    sum(activity.revenue) AS revenue
FROM cohorts
JOIN analytics.account_weeks AS activity USING (account_id)
GROUP BY 1, 2, 3, 4

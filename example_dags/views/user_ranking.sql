/* matview
name = "analytics.user_ranking"
comment = "Each buyer's revenue, rank within the plan and usual pause between two purchases"
refresh_strategy = "regular"
unique_index_columns = ["user_id"]

[[indexes]]
columns = ["plan", { column = "revenue", order = "desc" }]
*/
WITH purchases AS (
    SELECT
        user_id,
        amount,
        occurred_at,
        occurred_at - lag(occurred_at) OVER (PARTITION BY user_id ORDER BY occurred_at, id) AS pause
    FROM app.events
    WHERE event_type = 'purchase'
),
buyers AS (
    SELECT
        user_id,
        count(*) AS purchases,
        coalesce(sum(amount), 0) AS revenue,
        min(occurred_at) AS first_purchase_at,
        max(occurred_at) AS last_purchase_at,
        percentile_cont(0.5) WITHIN GROUP (ORDER BY pause) AS usual_pause
    FROM purchases
    GROUP BY user_id
)
SELECT
    buyers.*,
    "user".display_name,
    account.plan,
    rank() OVER (PARTITION BY account.plan ORDER BY buyers.revenue DESC) AS rank_in_plan,
    ntile(10) OVER (ORDER BY buyers.revenue DESC) AS revenue_decile,
    round(buyers.revenue / nullif(sum(buyers.revenue) OVER (PARTITION BY account.plan), 0), 6) AS share_of_plan
FROM buyers
JOIN app.users AS "user" ON "user".id = buyers.user_id
JOIN app.accounts AS account ON account.id = "user".account_id

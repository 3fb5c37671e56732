-- MatViewRun.where(status: :failed).where("created_at >= ?", 24.hours.ago).group(:mat_view_definition_id).count
SELECT COUNT(*) AS "count_all", "mat_view_runs"."mat_view_definition_id" AS "mat_view_runs_mat_view_definition_id"
FROM "mat_view_runs"
WHERE "mat_view_runs"."status" = 3 AND (created_at >= now() - interval '24 hours')
GROUP BY "mat_view_runs"."mat_view_definition_id"
